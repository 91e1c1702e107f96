// JSON that trusts nothing: read with limits, its fields taken by name and kind, everything unusual an error.
//
// Foundation's readers hold objects in dictionaries of Swift's strings, in which "Å" written in two ways is one key: a
// vocabulary would lose tokens. This one keeps keys apart by their bytes.

import Foundation

/// What went wrong, in words for whoever reads the findings.
public struct Trouble: Error, Equatable, CustomStringConvertible {
  public let message: String
  /// The runner lacks what it needs, rather than that something is broken.
  public let missing: Bool

  public init(_ message: String, missing: Bool = false) {
    self.message = message
    self.missing = missing
  }

  public var description: String { message }
}

/// A text that equals another when their bytes do; Swift's own strings are equal when they look alike.
public struct ByteText: Hashable {
  public let text: String

  public init(_ text: String) { self.text = text }

  public static func == (one: ByteText, other: ByteText) -> Bool { one.text.utf8.elementsEqual(other.text.utf8) }

  public func hash(into hasher: inout Hasher) {
    var text = text
    text.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
  }
}

/// One value of a JSON document. Whole numbers that fit 64 bits are `whole`, all other finite numbers `number`.
public enum Json: Equatable {
  case null
  case flag(Bool)
  case whole(Int64)
  case number(Double)
  case text(String)
  case list([Json])
  case object([Member])

  public struct Member: Equatable {
    public let name: String
    public let value: Json
  }

  static let deepest = 64

  /// Reads a file of at most `limit` bytes. Throws Trouble.
  public static func read(_ file: URL, limit: Int) throws -> Json {
    try parse(bytes(of: file, limit: limit), called: file.lastPathComponent)
  }

  /// The content of a plain file of at most `limit` bytes. Throws Trouble.
  static func bytes(of file: URL, limit: Int) throws -> Data {
    let name = file.lastPathComponent
    guard let handle = try? FileHandle(forReadingFrom: file) else { throw Trouble("\(name) cannot be read") }
    defer { try? handle.close() }
    guard let data = try? handle.read(upToCount: limit + 1) else { throw Trouble("\(name) cannot be read") }
    if data.count > limit { throw Trouble("\(name) has more than \(limit) bytes") }
    return data
  }

  /// Throws Trouble for anything but one whole document of JSON.
  public static func parse(_ data: Data, called name: String) throws -> Json {
    try data.withUnsafeBytes { raw in
      var reader = JsonReader(bytes: raw.bindMemory(to: UInt8.self), name: name)
      return try reader.document()
    }
  }
}

private struct JsonReader {
  let bytes: UnsafeBufferPointer<UInt8>
  let name: String
  var at = 0

  mutating func document() throws -> Json {
    let value = try value(depth: 0)
    skipSpace()
    if at < bytes.count { throw wrong("has something behind its end") }
    return value
  }

  private func wrong(_ what: String) -> Trouble { Trouble("\(name) \(what) at byte \(at)") }

  private mutating func skipSpace() {
    while at < bytes.count {
      switch bytes[at] {
      case 0x20, 0x09, 0x0A, 0x0D: at += 1
      default: return
      }
    }
  }

  private mutating func take(_ byte: Character) -> Bool {
    guard at < bytes.count, bytes[at] == byte.asciiValue else { return false }
    at += 1
    return true
  }

  private mutating func word(_ word: String) throws {
    for byte in word.utf8 {
      guard at < bytes.count, bytes[at] == byte else { throw wrong("is no JSON") }
      at += 1
    }
  }

  private mutating func value(depth: Int) throws -> Json {
    if depth > Json.deepest { throw wrong("is nested too deeply") }
    skipSpace()
    guard at < bytes.count else { throw wrong("ends too early") }
    switch bytes[at] {
    case UInt8(ascii: "{"): return try object(depth)
    case UInt8(ascii: "["): return try list(depth)
    case UInt8(ascii: "\""): return .text(try text())
    case UInt8(ascii: "t"):
      try word("true")
      return .flag(true)
    case UInt8(ascii: "f"):
      try word("false")
      return .flag(false)
    case UInt8(ascii: "n"):
      try word("null")
      return .null
    default: return try number()
    }
  }

  private mutating func object(_ depth: Int) throws -> Json {
    at += 1
    var members: [Json.Member] = []
    var names: Set<ByteText> = []
    skipSpace()
    if take("}") { return .object(members) }
    while true {
      skipSpace()
      guard at < bytes.count, bytes[at] == UInt8(ascii: "\"") else { throw wrong("lacks a name") }
      let name = try text()
      if !names.insert(ByteText(name)).inserted { throw wrong("names \(name.prefix(100)) twice") }
      skipSpace()
      if !take(":") { throw wrong("lacks a colon") }
      members.append(Json.Member(name: name, value: try value(depth: depth + 1)))
      skipSpace()
      if take("}") { return .object(members) }
      if !take(",") { throw wrong("lacks a comma or a brace") }
    }
  }

  private mutating func list(_ depth: Int) throws -> Json {
    at += 1
    var values: [Json] = []
    skipSpace()
    if take("]") { return .list(values) }
    while true {
      values.append(try value(depth: depth + 1))
      skipSpace()
      if take("]") { return .list(values) }
      if !take(",") { throw wrong("lacks a comma or a bracket") }
    }
  }

  private mutating func number() throws -> Json {
    let start = at
    var digits = 0
    var isWhole = true
    func isDigit(_ byte: UInt8) -> Bool { (0x30...0x39).contains(byte) }
    _ = take("-")
    let first = at
    while at < bytes.count, isDigit(bytes[at]) { at += 1 }
    digits = at - first
    if digits == 0 || (digits > 1 && bytes[first] == 0x30) { throw wrong("is no JSON") }
    if take(".") {
      isWhole = false
      let behind = at
      while at < bytes.count, isDigit(bytes[at]) { at += 1 }
      if at == behind { throw wrong("has a number without its end") }
    }
    if take("e") || take("E") {
      isWhole = false
      if !take("+") { _ = take("-") }
      let behind = at
      while at < bytes.count, isDigit(bytes[at]) { at += 1 }
      if at == behind { throw wrong("has a number without its end") }
    }
    let written = String(decoding: bytes[start..<at], as: UTF8.self)
    if isWhole, let whole = Int64(written) { return .whole(whole) }
    guard let number = Double(written), number.isFinite else { throw wrong("has a number beyond all bounds") }
    return .number(number)
  }

  private mutating func text() throws -> String {
    at += 1
    var made: [UInt8] = []
    while true {
      guard at < bytes.count else { throw wrong("has a text without an end") }
      let byte = bytes[at]
      at += 1
      switch byte {
      case UInt8(ascii: "\""):
        guard let text = String(validating: made, as: UTF8.self) else { throw wrong("has a text that is not UTF-8") }
        return text
      case UInt8(ascii: "\\"): try escape(into: &made)
      case 0..<0x20: throw wrong("has a control character in a text")
      default: made.append(byte)
      }
    }
  }

  private mutating func escape(into made: inout [UInt8]) throws {
    guard at < bytes.count else { throw wrong("has a text without an end") }
    let byte = bytes[at]
    at += 1
    switch byte {
    case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): made.append(byte)
    case UInt8(ascii: "b"): made.append(0x08)
    case UInt8(ascii: "f"): made.append(0x0C)
    case UInt8(ascii: "n"): made.append(0x0A)
    case UInt8(ascii: "r"): made.append(0x0D)
    case UInt8(ascii: "t"): made.append(0x09)
    case UInt8(ascii: "u"): try codePoint(into: &made)
    default: throw wrong("has an unknown escape")
    }
  }

  /// A character written as one or two `\uXXXX`.
  private mutating func codePoint(into made: inout [UInt8]) throws {
    var code = try hex()
    if (0xD800..<0xDC00).contains(code) {
      guard take("\\"), take("u") else { throw wrong("has half a character") }
      let low = try hex()
      guard (0xDC00..<0xE000).contains(low) else { throw wrong("has half a character") }
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
    }
    guard let scalar = Unicode.Scalar(code) else { throw wrong("has half a character") }
    made.append(contentsOf: String(Character(scalar)).utf8)
  }

  private mutating func hex() throws -> UInt32 {
    guard at + 4 <= bytes.count else { throw wrong("has a text without an end") }
    var code: UInt32 = 0
    for _ in 0..<4 {
      guard let digit = Character(Unicode.Scalar(bytes[at])).hexDigitValue else { throw wrong("has an unknown escape") }
      code = code << 4 | UInt32(digit)
      at += 1
    }
    return code
  }
}

/// The fields of one object of JSON, taken by name and kind; every error tells where.
public struct Fields {
  public let place: String
  private let values: [ByteText: Json]

  /// `only` are the names there may be; nil allows any. Throws Trouble.
  public init(_ json: Json, _ place: String, only: Set<String>? = nil) throws {
    guard case .object(let members) = json else { throw Trouble("\(place) is no object") }
    self.place = place
    self.values = Dictionary(uniqueKeysWithValues: members.map { (ByteText($0.name), $0.value) })
    if let only, let odd = members.first(where: { !only.contains($0.name) }) {
      throw Trouble("\(place) has the unknown field \(odd.name.prefix(100))")
    }
  }

  private func wrong(_ name: String, _ what: String) -> Trouble { Trouble("\(place).\(name) \(what)") }

  /// The value of a field; nil where it is missing or null.
  public func optional(_ name: String) -> Json? {
    let value = values[ByteText(name)]
    return value == .null ? nil : value
  }

  public func value(_ name: String) throws -> Json {
    guard let value = optional(name) else { throw wrong(name, "is missing") }
    return value
  }

  public func fields(_ name: String, only: Set<String>? = nil) throws -> Fields {
    try Fields(value(name), "\(place).\(name)", only: only)
  }

  /// The fields of an object that may be missing or null.
  public func optionalFields(_ name: String, only: Set<String>? = nil) throws -> Fields? {
    try optional(name).map { try Fields($0, "\(place).\(name)", only: only) }
  }

  public func text(_ name: String, default standard: String? = nil, longest: Int = 1 << 20) throws -> String {
    guard let value = optional(name) ?? standard.map(Json.text) else { throw wrong(name, "is missing") }
    guard case .text(let text) = value else { throw wrong(name, "is no text") }
    if text.utf8.count > longest { throw wrong(name, "has more than \(longest) bytes") }
    return text
  }

  /// A text of 1 to 256 characters.
  public func name(_ name: String) throws -> String {
    let found = try text(name)
    if found.isEmpty || found.unicodeScalars.count > 256 { throw wrong(name, "has not 1 to 256 characters") }
    return found
  }

  public func flag(_ name: String, default standard: Bool? = nil) throws -> Bool {
    guard let value = optional(name) ?? standard.map(Json.flag) else { throw wrong(name, "is missing") }
    guard case .flag(let flag) = value else { throw wrong(name, "is neither true nor false") }
    return flag
  }

  public func whole(_ name: String, _ range: ClosedRange<Int>, default standard: Int? = nil) throws -> Int {
    guard let value = optional(name) ?? standard.map({ .whole(Int64($0)) }) else { throw wrong(name, "is missing") }
    return try Self.whole(value, range, "\(place).\(name)")
  }

  private static func whole(_ value: Json, _ range: ClosedRange<Int>, _ place: String) throws -> Int {
    guard case .whole(let found) = value else { throw Trouble("\(place) is no whole number") }
    guard let number = Int(exactly: found), range.contains(number) else {
      throw Trouble("\(place) is \(found), not in \(range.lowerBound)...\(range.upperBound)")
    }
    return number
  }

  public func number(_ name: String, _ range: ClosedRange<Double>, default standard: Double? = nil) throws -> Double {
    guard let value = optional(name) ?? standard.map(Json.number) else { throw wrong(name, "is missing") }
    return try Self.number(value, range, "\(place).\(name)")
  }

  private static func number(_ value: Json, _ range: ClosedRange<Double>, _ place: String) throws -> Double {
    let found: Double
    switch value {
    case .whole(let whole): found = Double(whole)
    case .number(let number): found = number
    default: throw Trouble("\(place) is no number")
    }
    if !range.contains(found) {
      throw Trouble("\(place) is \(found), not in \(range.lowerBound)...\(range.upperBound)")
    }
    return found
  }

  public func list(_ name: String, longest: Int = 1 << 20) throws -> [Json] {
    guard case .list(let values) = try value(name) else { throw wrong(name, "is no list") }
    if values.count > longest { throw wrong(name, "has more than \(longest) entries") }
    return values
  }

  /// A list that is empty where it is missing.
  public func optionalList(_ name: String, longest: Int = 1 << 20) throws -> [Json] {
    optional(name) == nil ? [] : try list(name, longest: longest)
  }

  public func wholes(_ name: String, _ range: ClosedRange<Int>, optional may: Bool = false) throws -> [Int] {
    try (may ? optionalList(name) : list(name)).map { try Self.whole($0, range, "\(place).\(name)[]") }
  }

  public func numbers(_ name: String, _ range: ClosedRange<Double>, count: Int) throws -> [Double] {
    let values = try list(name)
    if values.count != count { throw wrong(name, "has \(values.count) entries, not \(count)") }
    return try values.map { try Self.number($0, range, "\(place).\(name)[]") }
  }

  public func texts(_ name: String) throws -> [String] {
    try optionalList(name).map {
      guard case .text(let text) = $0 else { throw wrong(name, "holds something that is no text") }
      return text
    }
  }

  /// What `make` makes of each object of a list.
  public func objects<Made>(_ name: String, optional may: Bool = false, _ make: (Json, String) throws -> Made) throws
    -> [Made]
  {
    try (may ? optionalList(name) : list(name)).enumerated().map { try make($1, "\(place).\(name)[\($0)]") }
  }
}
