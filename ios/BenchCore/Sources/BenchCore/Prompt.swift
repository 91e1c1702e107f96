// The question inside the conversation that the bundle's manifest holds, and the answer as it streams.

import Foundation

/// The tokenizer of a bundle together with the text around a question.
public final class Prompt {
  static let question = "{question}"
  static let replacement = Unicode.Scalar(0xFFFD)

  private let tokenizer: Tokenizer
  private let suffix: String
  private let trims: Bool
  private let image: (id: Int, text: String)
  private let special: [String]

  /// Throws Trouble where only the chat template says what stands behind the image: phones have no Jinja.
  public init(_ tokenizer: Tokenizer, _ info: PromptInfo) throws {
    guard let suffix = info.suffixText, suffix.utf8Range(of: Self.question) != nil else {
      throw Trouble(
        "only the chat template of this bundle says what stands behind a question, and this app has no Jinja: "
          + "make the token ids on the desktop and send them as a job", missing: true)
    }
    guard let id = info.image, let text = tokenizer.token(id) else {
      throw Trouble("\(Tokenizer.fileName) lacks the image token: it belongs to another model")
    }
    self.tokenizer = tokenizer
    self.suffix = suffix
    trims = info.trimsQuestion
    image = (id, text)
    special = tokenizer.special.sorted { $0.utf8.count < $1.utf8.count }
  }

  /// The ids behind the image. Throws Trouble for an empty question, or one that holds a special token.
  public func ids(of question: String) throws -> [Int] {
    let trimmed = question.withoutOuterSpace
    if trimmed.isEmpty { throw Trouble("the question is empty; ask something") }
    if question.utf8Range(of: image.text) != nil {
      throw Trouble("the question holds \(image.text), a second image; one image is supported")
    }
    if let token = special.first(where: { question.utf8Range(of: $0) != nil }) {
      throw Trouble("the question holds the special token \(token), which only the conversation may have")
    }
    // Behind the image token, as in the whole conversation: some tokenizers treat the start of a text specially.
    let text = image.text + suffix.replacingBytes(of: Self.question, with: trims ? trimmed : question)
    let ids = tokenizer.encode(text)
    guard let at = ids.firstIndex(of: image.id) else {
      throw Trouble("\(Tokenizer.fileName) does not find its image token")
    }
    return Array(ids[(at + 1)...])
  }

  /// A stream of text, to be given the ids of an answer.
  public func stream() -> AnswerText { AnswerText(tokenizer) }
}

/// An answer as it becomes text, piece by piece; a character of several tokens comes out when it is whole.
public struct AnswerText {
  private let tokenizer: Tokenizer
  private let special: Set<ByteText>
  private let broken: [Int]
  private var sound: [Int] = []
  /// Id and byte of a character that is not whole.
  private var begun: [(id: Int, byte: UInt8)] = []
  private var said: [Unicode.Scalar] = []

  init(_ tokenizer: Tokenizer) {
    self.tokenizer = tokenizer
    special = Set(tokenizer.special.map(ByteText.init))
    let bytes = ["<0xEF>", "<0xBF>", "<0xBD>"].compactMap(tokenizer.id(of:))
    broken = bytes.count == 3 ? bytes : []
  }

  /// What can be shown now that this id has come.
  public mutating func append(_ id: Int) -> String {
    if let token = tokenizer.token(id) {
      if tokenizer.hasByteTokens, let byte = byteOfToken(token) {
        begun.append((id, byte))
        settle(atEnd: false)
      } else if !special.contains(ByteText(token)) {
        settle(atEnd: true)
        sound.append(id)
      }
    }
    var text = Array(tokenizer.decode(sound).unicodeScalars)
    // What ends in a replacement may be a character on its way.
    if text.last == Prompt.replacement { text.removeLast() }
    return unsaid(text)
  }

  /// What is left once no id comes any more.
  public mutating func finish() -> String {
    settle(atEnd: true)
    return unsaid(Array(tokenizer.decode(sound).unicodeScalars))
  }

  private mutating func unsaid(_ text: [Unicode.Scalar]) -> String {
    let same = zip(text, said).prefix { $0 == $1 }.count
    if same == text.count { return "" }
    said = text
    var piece = String.UnicodeScalarView()
    piece.append(contentsOf: text[same...])
    return String(piece)
  }

  /// Moves what is decided from `begun` to `sound`: a whole character, or bytes that belong to none.
  private mutating func settle(atEnd: Bool) {
    while !begun.isEmpty {
      switch beginning(of: begun.map(\.byte)) {
      case .whole:
        sound += begun.map(\.id)
        begun = []
      case .open where !atEnd: return
      case .open: spoil(begun.count)
      case .broken(let count): spoil(count)
      }
    }
  }

  private mutating func spoil(_ count: Int) {
    for (id, _) in begun[..<count] { sound += broken.isEmpty ? [id] : broken }
    begun.removeFirst(count)
  }
}

private enum Beginning {
  case whole
  case open
  case broken(Int)
}

/// Whether bytes are whole characters, may become so, or how many of them cannot belong to any.
private func beginning(of bytes: [UInt8]) -> Beginning {
  var at = 0
  while at < bytes.count {
    let first = bytes[at]
    let length: Int
    switch first {
    case 0..<0x80: length = 1
    case 0xC2...0xDF: length = 2
    case 0xE0...0xEF: length = 3
    case 0xF0...0xF4: length = 4
    default: return .broken(at + 1)
    }
    for offset in 1..<max(length, 2) where offset < length {
      guard at + offset < bytes.count else { return .open }
      var allowed: ClosedRange<UInt8> = 0x80...0xBF
      if offset == 1 {
        switch first {
        case 0xE0: allowed = 0xA0...0xBF
        case 0xED: allowed = 0x80...0x9F
        case 0xF0: allowed = 0x90...0xBF
        case 0xF4: allowed = 0x80...0x8F
        default: break
        }
      }
      if !allowed.contains(bytes[at + offset]) { return .broken(at + offset) }
    }
    at += length
  }
  return .whole
}

extension String {
  /// Where another text stands in this one, byte by byte.
  func utf8Range(of other: String) -> Range<Int>? {
    let (text, wanted) = (Bytes(utf8), Bytes(other.utf8))
    guard let first = wanted.first, wanted.count <= text.count else { return nil }
    for at in 0...text.count - wanted.count where text[at] == first && text[at...].starts(with: wanted) {
      return at..<at + wanted.count
    }
    return nil
  }

  /// The same with every occurrence replaced.
  fileprivate func replacingBytes(of other: String, with text: String) -> String {
    var made = ""
    var rest = self
    while let range = rest.utf8Range(of: other) {
      let bytes = Bytes(rest.utf8)
      made += String(decoding: bytes[..<range.lowerBound], as: UTF8.self) + text
      rest = String(decoding: bytes[range.upperBound...], as: UTF8.self)
    }
    return made + rest
  }

  /// Without white space at both ends, as Python strips it.
  fileprivate var withoutOuterSpace: String {
    func isSpace(_ scalar: Unicode.Scalar) -> Bool {
      scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
    }
    let start = unicodeScalars.drop(while: isSpace)
    let count = start.reversed().prefix(while: isSpace).count
    return String(String.UnicodeScalarView(start.dropLast(count)))
  }
}
