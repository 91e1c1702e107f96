// Text to token ids and back, as a tokenizer.json says; a kind of step that is not known here is refused by name.
//
// Text is held as UTF-8 bytes: Swift compares strings by how they look, tokens differ by their bytes.

import Foundation

typealias Bytes = [UInt8]

/// The tokenizer of a tokenizer.json with byte pair encoding.
public final class Tokenizer {
  static let fileName = "tokenizer.json"
  static let largest = 256 << 20

  private let normaliser: Normaliser
  private let cutter: Cutter
  private let model: BytePairs
  private let decoder: Decoder?
  private let added: AddedTokens

  /// Reads the file in the bundle's folder. Throws Trouble.
  public convenience init(bundle folder: URL) throws {
    try self.init(Json.read(folder.appendingPathComponent(Self.fileName), limit: Self.largest))
  }

  init(_ json: Json) throws {
    let fields = try Fields(json, Self.fileName)
    normaliser = try fields.optional("normalizer").map { try Normaliser($0, "\(Self.fileName).normalizer") } ?? .none
    cutter = try fields.optional("pre_tokenizer").map { try Cutter($0, "\(Self.fileName).pre_tokenizer") } ?? .none
    decoder = try fields.optional("decoder").map { try Decoder($0, "\(Self.fileName).decoder") }
    let model = try BytePairs(fields.fields("model"))
    let tokens = try fields.objects("added_tokens", optional: true, AddedToken.init)
    self.model = model
    added = AddedTokens(tokens, normaliser)
  }

  /// True where single bytes are tokens that the decoder puts together.
  var hasByteTokens: Bool { decoder?.puts == true }

  var special: [String] { added.all.filter(\.special).map { String(decoding: $0.content, as: UTF8.self) } }

  func token(_ id: Int) -> String? { added.token(id) ?? model.token(id) }

  func id(of token: String) -> Int? { added.id(of: token) ?? model.id(of: token) }

  /// Token ids, without what a post-processor adds around them.
  public func encode(_ text: String) -> [Int] {
    var ids: [Int] = []
    for outer in added.split(Bytes(text.utf8), normalised: false) {
      guard case .text(let raw, let atStart) = outer else {
        ids.append(outer.id)
        continue
      }
      for inner in added.split(normaliser.apply(raw), normalised: true) {
        guard case .text(let clean, let first) = inner else {
          ids.append(inner.id)
          continue
        }
        for piece in cutter.apply([clean], atStart: atStart && first) { ids += model.ids(of: piece) }
      }
    }
    return ids
  }

  /// The text of all ids together, without special tokens and unknown ids.
  public func decode(_ ids: [Int]) -> String {
    let tokens = ids.compactMap(token).filter { !added.isSpecial($0) }.map { Bytes($0.utf8) }
    guard let decoder else { return String(decoding: Bytes(tokens.joined(separator: [0x20])), as: UTF8.self) }
    return String(decoding: Bytes(decoder.apply(tokens).joined()), as: UTF8.self)
  }
}

// MARK: - Added tokens

private struct AddedToken {
  let id: Int
  let content: Bytes
  let special: Bool
  let normalised: Bool
  let takesSpaceBefore: Bool
  let takesSpaceBehind: Bool

  init(_ json: Json, _ place: String) throws {
    let fields = try Fields(json, place)
    id = try fields.whole("id", 0...Int(Int32.max))
    content = Bytes(try fields.text("content").utf8)
    special = try fields.flag("special", default: false)
    normalised = try fields.flag("normalized", default: false)
    takesSpaceBefore = try fields.flag("lstrip", default: false)
    takesSpaceBehind = try fields.flag("rstrip", default: false)
    if try fields.flag("single_word", default: false) {
      throw Trouble("\(place) is looked for as a single word, which is not known here", missing: true)
    }
    if content.isEmpty { throw Trouble("\(place) is empty") }
  }
}

/// The tokens that text is searched for before anything else.
private struct AddedTokens {
  enum Part {
    case token(Int)
    case text(Bytes, atStart: Bool)

    var id: Int {
      if case .token(let id) = self { return id }
      return 0
    }
  }

  let all: [AddedToken]
  /// As they stand in normalised text where that is what is searched for them.
  private let texts: [Int: String]
  private let special: Set<ByteText>
  /// Patterns by their first byte, the longest first; those of raw and those of normalised text.
  private var raw: [UInt8: [(pattern: Bytes, token: AddedToken)]] = [:]
  private var normalised: [UInt8: [(pattern: Bytes, token: AddedToken)]] = [:]

  init(_ tokens: [AddedToken], _ normaliser: Normaliser) {
    all = tokens
    special = Set(tokens.filter(\.special).map { ByteText(String(decoding: $0.content, as: UTF8.self)) })
    var texts: [Int: String] = [:]
    for token in tokens {
      let pattern = token.normalised ? normaliser.apply(token.content) : token.content
      texts[token.id] = String(decoding: pattern, as: UTF8.self)
      guard let first = pattern.first else { continue }
      if token.normalised {
        normalised[first, default: []].append((pattern, token))
      } else {
        raw[first, default: []].append((pattern, token))
      }
    }
    self.texts = texts
    for key in raw.keys { raw[key]?.sort { $0.pattern.count > $1.pattern.count } }
    for key in normalised.keys { normalised[key]?.sort { $0.pattern.count > $1.pattern.count } }
  }

  func token(_ id: Int) -> String? { texts[id] }

  func isSpecial(_ token: String) -> Bool { special.contains(ByteText(token)) }

  func id(of token: String) -> Int? { all.first { $0.content == Bytes(token.utf8) }?.id }

  /// Cuts text at these tokens: the leftmost first, the longest of those that begin there.
  func split(_ text: Bytes, normalised wanted: Bool) -> [Part] {
    let patterns = wanted ? normalised : raw
    var parts: [Part] = []
    var start = 0
    var at = 0
    while at < text.count {
      guard let found = patterns[text[at]]?.first(where: { text[at...].starts(with: $0.pattern) }) else {
        at += 1
        continue
      }
      var before = at
      if found.token.takesSpaceBefore { before = max(start, text.endWithoutSpace(upTo: at)) }
      if before > start { parts.append(.text(Bytes(text[start..<before]), atStart: start == 0)) }
      parts.append(.token(found.token.id))
      at += found.pattern.count
      if found.token.takesSpaceBehind { at = text.startWithoutSpace(from: at) }
      start = at
    }
    if start < text.count { parts.append(.text(Bytes(text[start...]), atStart: start == 0)) }
    return parts
  }
}

extension Bytes {
  /// The place behind the last character before `end` that is no white space.
  fileprivate func endWithoutSpace(upTo end: Int) -> Int {
    let scalars = String(decoding: self[..<end], as: UTF8.self).unicodeScalars
    let spaces = scalars.reversed().prefix { $0.properties.isWhitespace }
    return end - spaces.reduce(0) { $0 + UTF8.width($1) }
  }

  /// The place of the first character from `start` on that is no white space.
  fileprivate func startWithoutSpace(from start: Int) -> Int {
    let scalars = String(decoding: self[start...], as: UTF8.self).unicodeScalars
    return start + scalars.prefix { $0.properties.isWhitespace }.reduce(0) { $0 + UTF8.width($1) }
  }

  fileprivate func replacing(_ pattern: Bytes, with content: Bytes) -> Bytes {
    var made: Bytes = []
    var start = 0
    for range in Pattern.literal(pattern).matches(in: self) {
      made += self[start..<range.lowerBound] + content
      start = range.upperBound
    }
    return made + self[start...]
  }
}

// MARK: - Patterns

/// What text is searched for.
private enum Pattern {
  case literal(Bytes)
  case regex(NSRegularExpression)

  init(_ json: Json, _ place: String) throws {
    let fields = try Fields(json, place)
    if fields.optional("String") != nil {
      self = .literal(Bytes(try fields.text("String").utf8))
    } else {
      self = try .regex(Self.compiled(fields.text("Regex", longest: 10_000), place))
    }
  }

  /// ICU's white space lacks two characters that the library's has, so it is spelled as the Unicode property.
  static func compiled(_ written: String, _ place: String) throws -> NSRegularExpression {
    var spelled = ""
    var escaped = false
    for scalar in written.unicodeScalars {
      if escaped {
        escaped = false
        spelled += scalar == "s" ? "\\p{White_Space}" : scalar == "S" ? "\\P{White_Space}" : "\\\(scalar)"
      } else if scalar == "\\" {
        escaped = true
      } else {
        spelled.unicodeScalars.append(scalar)
      }
    }
    do {
      return try NSRegularExpression(pattern: spelled)
    } catch {
      throw Trouble("\(place) has a pattern that cannot be read: \(written.prefix(200))", missing: true)
    }
  }

  /// Where it is found, in bytes, from left to right; what is found never overlaps.
  func matches(in text: Bytes) -> [Range<Int>] {
    switch self {
    case .literal(let pattern):
      guard let first = pattern.first else { return [] }
      var found: [Range<Int>] = []
      var at = 0
      while at + pattern.count <= text.count {
        if text[at] == first && text[at...].starts(with: pattern) {
          found.append(at..<at + pattern.count)
          at += pattern.count
        } else {
          at += 1
        }
      }
      return found
    case .regex(let regex):
      let string = String(decoding: text, as: UTF8.self)
      // From places in UTF-16, which regular expressions count in, to places in UTF-8.
      var places: [Int] = []
      places.reserveCapacity(string.utf16.count + 1)
      var at = 0
      for scalar in string.unicodeScalars {
        for _ in 0..<UTF16.width(scalar) { places.append(at) }
        at += UTF8.width(scalar)
      }
      places.append(at)
      return regex.matches(in: string, range: NSRange(location: 0, length: places.count - 1)).map {
        places[$0.range.location]..<places[$0.range.location + $0.range.length]
      }
    }
  }
}

/// The kind of a step, for its `type`. Throws Trouble for none.
private func kind(_ json: Json, _ place: String) throws -> (name: String, fields: Fields) {
  let fields = try Fields(json, place)
  return (try fields.text("type"), fields)
}

private func unknown(_ kind: String, _ place: String) -> Trouble {
  Trouble("\(place) is of the kind \(kind.prefix(100)), which this app does not know", missing: true)
}

// MARK: - Steps

private indirect enum Normaliser {
  case none
  case prepend(Bytes)
  case replace(Pattern, Bytes)
  case composed
  case sequence([Normaliser])

  init(_ json: Json, _ place: String) throws {
    let (name, fields) = try kind(json, place)
    switch name {
    case "Prepend": self = .prepend(Bytes(try fields.text("prepend").utf8))
    case "Replace":
      self = .replace(try Pattern(fields.value("pattern"), place), Bytes(try fields.text("content").utf8))
    case "NFC": self = .composed
    case "Sequence": self = .sequence(try fields.objects("normalizers", Normaliser.init))
    default: throw unknown(name, place)
    }
  }

  func apply(_ text: Bytes) -> Bytes {
    switch self {
    case .none: return text
    case .prepend(let mark): return text.isEmpty ? text : mark + text
    case .replace(.literal(let pattern), let content): return text.replacing(pattern, with: content)
    case .replace(let pattern, let content):
      var made: Bytes = []
      var start = 0
      for range in pattern.matches(in: text) {
        made += text[start..<range.lowerBound] + content
        start = range.upperBound
      }
      return made + text[start...]
    case .composed: return Bytes(String(decoding: text, as: UTF8.self).precomposedStringWithCanonicalMapping.utf8)
    case .sequence(let steps): return steps.reduce(text) { $1.apply($0) }
    }
  }
}

/// Cuts text into the pieces that the model sees one by one.
private indirect enum Cutter {
  enum Behaviour: String {
    case removed = "Removed"
    case isolated = "Isolated"
    case withPrevious = "MergedWithPrevious"
    case withNext = "MergedWithNext"
    case contiguous = "Contiguous"
  }

  case none
  case split(Pattern, Behaviour, inverted: Bool)
  case byteLevel(prefix: Bool, Pattern?)
  case metaspace(Bytes, prefix: Prefix, splits: Bool)
  case sequence([Cutter])

  enum Prefix: String { case always, first, never }

  static let words = #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

  init(_ json: Json, _ place: String) throws {
    let (name, fields) = try kind(json, place)
    switch name {
    case "ByteLevel":
      let words = try Pattern.regex(Pattern.compiled(Self.words, place))
      self = .byteLevel(
        prefix: try fields.flag("add_prefix_space", default: true),
        try fields.flag("use_regex", default: true) ? words : nil)
    case "Split":
      guard let behaviour = Behaviour(rawValue: try fields.text("behavior")) else {
        throw unknown(try fields.text("behavior"), place)
      }
      self = .split(
        try Pattern(fields.value("pattern"), place), behaviour, inverted: try fields.flag("invert", default: false))
    case "Digits":
      let digits = try Pattern.regex(Pattern.compiled(#"\p{N}"#, place))
      let alone = try fields.flag("individual_digits", default: false)
      self = .split(digits, alone ? .isolated : .contiguous, inverted: false)
    case "Metaspace":
      let old = try fields.flag("add_prefix_space", default: true) ? Prefix.always : .never
      let scheme = try fields.text("prepend_scheme", default: old.rawValue)
      guard let prefix = Prefix(rawValue: scheme) else { throw unknown(scheme, place) }
      self = .metaspace(
        Bytes(try fields.text("replacement").utf8), prefix: prefix, splits: try fields.flag("split", default: true))
    case "Sequence": self = .sequence(try fields.objects("pretokenizers", Cutter.init))
    default: throw unknown(name, place)
    }
  }

  /// `atStart`: the first piece is the beginning of the whole text.
  func apply(_ pieces: [Bytes], atStart: Bool) -> [Bytes] {
    switch self {
    case .none: return pieces
    case .split(let pattern, let behaviour, let inverted):
      return pieces.flatMap { Self.cut($0, at: pattern, behaviour, inverted) }
    case .byteLevel(let prefix, let words):
      return pieces.flatMap { piece in
        let whole = prefix && piece.first != 0x20 ? [0x20] + piece : piece
        let cut = words.map { Self.cut(whole, at: $0, .isolated, false) } ?? [whole]
        return cut.map { $0.flatMap { ByteLetters.letters[Int($0)] } }
      }
    case .metaspace(let mark, let prefix, let splits):
      return pieces.enumerated().flatMap { number, piece in
        var marked = piece.replacing([0x20], with: mark)
        let wanted = prefix == .always || (prefix == .first && atStart && number == 0)
        if wanted && !marked.starts(with: mark) { marked = mark + marked }
        return splits ? Self.cut(marked, at: .literal(mark), .withNext, false) : [marked]
      }
    case .sequence(let steps): return steps.reduce(pieces) { $1.apply($0, atStart: atStart) }
    }
  }

  private static func cut(_ text: Bytes, at pattern: Pattern, _ behaviour: Behaviour, _ inverted: Bool) -> [Bytes] {
    var parts: [(range: Range<Int>, isMatch: Bool)] = []
    var start = 0
    for range in pattern.matches(in: text) {
      if range.lowerBound > start { parts.append((start..<range.lowerBound, inverted)) }
      parts.append((range, !inverted))
      start = range.upperBound
    }
    if start < text.count { parts.append((start..<text.count, inverted)) }
    var made: [Range<Int>] = []
    switch behaviour {
    case .isolated: made = parts.map(\.range)
    case .removed: made = parts.filter { !$0.isMatch }.map(\.range)
    case .contiguous: made = merged(parts) { $0 == $1 }
    case .withPrevious: made = merged(parts) { !$0 && $1 }
    case .withNext: made = mergedForwards(parts)
    }
    return made.filter { !$0.isEmpty }.map { Bytes(text[$0]) }
  }

  /// Joins a part to the one before where `joins` says so of the two: was that a match, is this one.
  private static func merged(_ parts: [(range: Range<Int>, isMatch: Bool)], _ joins: (Bool, Bool) -> Bool)
    -> [Range<Int>]
  {
    var made: [Range<Int>] = []
    var previous: Bool?
    for part in parts {
      if let before = previous, joins(before, part.isMatch), let last = made.last {
        made[made.count - 1] = last.lowerBound..<part.range.upperBound
      } else {
        made.append(part.range)
      }
      previous = part.isMatch
    }
    return made
  }

  /// Joins a match to the part behind it.
  private static func mergedForwards(_ parts: [(range: Range<Int>, isMatch: Bool)]) -> [Range<Int>] {
    var made: [Range<Int>] = []
    var following: Bool?
    for part in parts.reversed() {
      if part.isMatch, following == false, let last = made.last {
        made[made.count - 1] = part.range.lowerBound..<last.upperBound
      } else {
        made.append(part.range)
      }
      following = part.isMatch
    }
    return made.reversed()
  }
}

/// The letters that stand for bytes in vocabularies: printable bytes for themselves, the others from U+0100 on.
private enum ByteLetters {
  static let scalars: [Unicode.Scalar] = {
    let plain = Set(0x21...0x7E).union(0xA1...0xAC).union(0xAE...0xFF)
    var next: UInt32 = 0x100
    return (0..<256).map { byte in
      if plain.contains(byte) { return Unicode.Scalar(UInt8(byte)) }
      defer { next += 1 }
      return Unicode.Scalar(next) ?? "?"
    }
  }()
  static let letters = scalars.map { Bytes(String(Character($0)).utf8) }
  static let bytes = Dictionary(uniqueKeysWithValues: scalars.enumerated().map { ($1, UInt8($0)) })
}

private indirect enum Decoder {
  case byteLevel
  case replace(Pattern, Bytes)
  case byteFallback
  case fuse
  case strip(Bytes, start: Int, stop: Int)
  case metaspace(Bytes, prefix: Bool)
  case sequence([Decoder])

  init(_ json: Json, _ place: String) throws {
    let (name, fields) = try kind(json, place)
    switch name {
    case "ByteLevel": self = .byteLevel
    case "Replace":
      self = .replace(try Pattern(fields.value("pattern"), place), Bytes(try fields.text("content").utf8))
    case "ByteFallback": self = .byteFallback
    case "Fuse": self = .fuse
    case "Strip":
      let content = Bytes(try fields.text("content").utf8)
      if content.isEmpty { throw Trouble("\(place) strips nothing") }
      self = .strip(
        content, start: try fields.whole("start", 0...1_000_000), stop: try fields.whole("stop", 0...1_000_000))
    case "Metaspace":
      let old = try fields.flag("add_prefix_space", default: true) ? "always" : "never"
      let scheme = try fields.text("prepend_scheme", default: old)
      self = .metaspace(Bytes(try fields.text("replacement").utf8), prefix: scheme != "never")
    case "Sequence": self = .sequence(try fields.objects("decoders", Decoder.init))
    default: throw unknown(name, place)
    }
  }

  /// True where it puts tokens of single bytes together.
  var puts: Bool {
    switch self {
    case .byteFallback: return true
    case .sequence(let steps): return steps.contains { $0.puts }
    default: return false
    }
  }

  func apply(_ tokens: [Bytes]) -> [Bytes] {
    switch self {
    case .byteLevel: return [Bytes(tokens.flatMap(Self.bytes))]
    case .replace(let pattern, let content): return tokens.map { Normaliser.replace(pattern, content).apply($0) }
    case .byteFallback: return Self.joinedBytes(tokens)
    case .fuse: return [Bytes(tokens.joined())]
    case .strip(let content, let start, let stop): return tokens.map { Self.stripped($0, content, start, stop) }
    case .metaspace(let mark, let prefix):
      // Of the first token all marks are dropped, as the library has it.
      return tokens.enumerated().map { $1.replacing(mark, with: $0 == 0 && prefix ? [] : [0x20]) }
    case .sequence(let steps): return steps.reduce(tokens) { $1.apply($0) }
    }
  }

  /// The bytes that a token's letters stand for; its own where one of them is no such letter.
  private static func bytes(of token: Bytes) -> Bytes {
    var made: Bytes = []
    for scalar in String(decoding: token, as: UTF8.self).unicodeScalars {
      guard let byte = ByteLetters.bytes[scalar] else { return token }
      made.append(byte)
    }
    return made
  }

  private static func joinedBytes(_ tokens: [Bytes]) -> [Bytes] {
    var made: [Bytes] = []
    var run: Bytes = []
    func end() {
      if run.isEmpty { return }
      if String(validating: run, as: UTF8.self) != nil {
        made.append(run)
      } else {
        made += Array(repeating: Bytes("\u{FFFD}".utf8), count: run.count)
      }
      run = []
    }
    for token in tokens {
      if let byte = byteOfToken(String(decoding: token, as: UTF8.self)) {
        run.append(byte)
      } else {
        end()
        made.append(token)
      }
    }
    end()
    return made
  }

  private static func stripped(_ token: Bytes, _ content: Bytes, _ start: Int, _ stop: Int) -> Bytes {
    var rest = token[...]
    for _ in 0..<start where rest.starts(with: content) { rest = rest.dropFirst(content.count) }
    for _ in 0..<stop where rest.count >= content.count && rest.suffix(content.count).elementsEqual(content) {
      rest = rest.dropLast(content.count)
    }
    return Bytes(rest)
  }
}

/// The byte that a token such as `<0x0A>` stands for.
func byteOfToken(_ token: String) -> UInt8? {
  let bytes = Bytes(token.utf8)
  guard bytes.count == 6, bytes.starts(with: Bytes("<0x".utf8)), bytes[5] == UInt8(ascii: ">") else { return nil }
  return UInt8(String(decoding: bytes[3..<5], as: UTF8.self), radix: 16)
}

// MARK: - The model

/// Byte pair encoding.
private struct BytePairs {
  private struct Pair: Hashable {
    let left: Int
    let right: Int
  }

  private struct Merge {
    let rank: Int
    let made: Int
  }

  private let vocabulary: [ByteText: Int]
  private let tokens: [Int: String]
  private let merges: [Pair: Merge]
  private let unknown: Int?
  private let fusesUnknown: Bool
  private let byteTokens: [Int]?
  private let ignoresMerges: Bool

  init(_ fields: Fields) throws {
    let type = try fields.text("type", default: "BPE")
    if type != "BPE" { throw BenchCore.unknown(type, fields.place) }
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] where !(try fields.text(name, default: "").isEmpty)
    {
      throw Trouble("\(fields.place).\(name) is set, which this app does not know", missing: true)
    }
    guard case .object(let members) = try fields.value("vocab") else {
      throw Trouble("\(fields.place).vocab is no object")
    }
    var vocabulary: [ByteText: Int] = [:]
    var tokens: [Int: String] = [:]
    vocabulary.reserveCapacity(members.count)
    tokens.reserveCapacity(members.count)
    for member in members {
      guard case .whole(let whole) = member.value, (0...Int64(Int32.max)).contains(whole) else {
        throw Trouble("\(fields.place).vocab has no id for \(member.name.prefix(100))")
      }
      vocabulary[ByteText(member.name)] = Int(whole)
      tokens[Int(whole)] = member.name
    }
    var merges: [Pair: Merge] = [:]
    for (rank, entry) in try fields.list("merges", longest: 10_000_000).enumerated() {
      let (left, right) = try Self.halves(entry, fields.place)
      guard let first = vocabulary[ByteText(left)], let second = vocabulary[ByteText(right)],
        let made = vocabulary[ByteText(left + right)]
      else { throw Trouble("\(fields.place).merges[\(rank)] is of tokens that the vocabulary lacks") }
      merges[Pair(left: first, right: second)] = Merge(rank: rank, made: made)
    }
    let unknown = try fields.text("unk_token", default: "")
    self.unknown = unknown.isEmpty ? nil : vocabulary[ByteText(unknown)]
    if !unknown.isEmpty && self.unknown == nil { throw Trouble("\(fields.place).unk_token is not in the vocabulary") }
    fusesUnknown = try fields.flag("fuse_unk", default: false)
    ignoresMerges = try fields.flag("ignore_merges", default: false)
    let named = (0..<256).compactMap { vocabulary[ByteText("<0x" + hex(UInt8($0)) + ">")] }
    byteTokens = try fields.flag("byte_fallback", default: false) && named.count == 256 ? named : nil
    self.vocabulary = vocabulary
    self.tokens = tokens
    self.merges = merges
  }

  /// Of `["a", "b"]`, or of `a b` as older files have it.
  private static func halves(_ json: Json, _ place: String) throws -> (String, String) {
    switch json {
    case .list(let parts):
      if parts.count == 2, case .text(let left) = parts[0], case .text(let right) = parts[1] { return (left, right) }
    case .text(let text):
      let parts = text.utf8.split(separator: 0x20, omittingEmptySubsequences: false)
      if parts.count == 2 {
        return (String(decoding: parts[0], as: UTF8.self), String(decoding: parts[1], as: UTF8.self))
      }
    default: break
    }
    throw Trouble("\(place).merges has an entry that is no pair")
  }

  func token(_ id: Int) -> String? { tokens[id] }

  func id(of token: String) -> Int? { vocabulary[ByteText(token)] }

  func ids(of piece: Bytes) -> [Int] {
    let text = String(decoding: piece, as: UTF8.self)
    if ignoresMerges, let id = vocabulary[ByteText(text)] { return [id] }
    var ids: [Int] = []
    var pending: Int?
    for scalar in text.unicodeScalars {
      let letter = String(Character(scalar))
      if let id = vocabulary[ByteText(letter)] {
        if let unknown = pending { ids.append(unknown) }
        pending = nil
        ids.append(id)
      } else if let byteTokens {
        // Before an unknown token that is still pending, as the library has it.
        ids += letter.utf8.map { byteTokens[Int($0)] }
      } else if let unknown {
        if let before = pending, !fusesUnknown { ids.append(before) }
        pending = unknown
      }
    }
    if let unknown = pending { ids.append(unknown) }
    return merged(ids)
  }

  /// Joins the pair that was learned first, the leftmost of several, until none is left.
  private func merged(_ start: [Int]) -> [Int] {
    guard start.count > 1 else { return start }
    var ids = start
    func rank(_ at: Int) -> Int { merges[Pair(left: ids[at], right: ids[at + 1])]?.rank ?? Int.max }
    var ranks = (0..<ids.count - 1).map(rank)
    while let best = ranks.min(), best < Int.max, let at = ranks.firstIndex(of: best) {
      guard let merge = merges[Pair(left: ids[at], right: ids[at + 1])] else { break }
      ids[at] = merge.made
      ids.remove(at: at + 1)
      ranks.remove(at: at)
      if at < ranks.count { ranks[at] = rank(at) }
      if at > 0 { ranks[at - 1] = rank(at - 1) }
    }
    return ids
  }
}

private func hex(_ byte: UInt8) -> String {
  let digits = String(byte, radix: 16, uppercase: true)
  return digits.count == 1 ? "0" + digits : digits
}
