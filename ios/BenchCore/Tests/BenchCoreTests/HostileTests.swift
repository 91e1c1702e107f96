// Files that are broken, or made to break the reader: each gives an error in words, none a crash.

import Foundation
import XCTest

@testable import BenchCore

final class HostileTests: XCTestCase {
  private var folder = URL(fileURLWithPath: "/")

  override func setUpWithError() throws {
    folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
  }

  override func tearDownWithError() throws { try FileManager.default.removeItem(at: folder) }

  private func assertTrouble<Made>(
    _ words: String, line: UInt = #line, _ make: () throws -> Made
  ) {
    XCTAssertThrowsError(try make(), line: line) { error in
      let message = (error as? Trouble)?.message ?? "no Trouble: \(error)"
      XCTAssertTrue(message.contains(words), message, line: line)
    }
  }

  private func parse(_ text: String) throws -> Json { try Json.parse(Data(text.utf8), called: "x.json") }

  // MARK: - JSON

  func testJson() throws {
    for (text, words) in [
      ("", "ends too early"), ("{", "lacks a name"), ("[1,", "ends too early"), ("[1 2]", "lacks a comma"),
      ("{\"a\" 1}", "lacks a colon"), ("{\"a\": 1,}", "lacks a name"), ("nul", "is no JSON"), ("NaN", "is no JSON"),
      ("Infinity", "is no JSON"), ("-", "is no JSON"), ("01", "is no JSON"), ("1.", "without its end"),
      ("1e", "without its end"), ("1e400", "beyond all bounds"), ("\"abc", "without an end"),
      ("\"\\q\"", "unknown escape"), ("\"\\ud800\"", "half a character"), ("\"\\ud800\\u0041\"", "half a character"),
      ("\"\\u12\"", "without an end"), ("\"a\nb\"", "control character"), ("1 1", "behind its end"),
      ("{\"a\": 1, \"a\": 2}", "twice"), (String(repeating: "[", count: 100_000), "too deeply"),
      (String(repeating: "{\"a\":", count: 100_000), "too deeply"),
    ] {
      assertTrouble(words) { try parse(text) }
    }
    assertTrouble("not UTF-8") { try Json.parse(Data([0x22, 0xC3, 0x28, 0x22]), called: "x.json") }
    XCTAssertEqual(try parse("\"\\ud83d\\ude42\\u0000\""), .text("🙂\0"))
    XCTAssertEqual(try parse(" [1, -2.5e1, true, null] "), .list([.whole(1), .number(-25), .flag(true), .null]))
    XCTAssertEqual(try parse("99999999999999999999"), .number(1e20))
    // Two ways to write one letter are two names.
    guard case .object(let members) = try parse("{\"\\u00c5\": 1, \"\\u212b\": 2}") else { return XCTFail() }
    XCTAssertEqual(members.count, 2)
  }

  func testLargeFilesAreNotRead() throws {
    let file = folder.appendingPathComponent("large.json")
    try Data(repeating: 0x20, count: 1001).write(to: file)
    assertTrouble("more than 1000 bytes") { try Json.read(file, limit: 1000) }
    assertTrouble("cannot be read") { try Json.read(folder.appendingPathComponent("none.json"), limit: 1000) }
  }

  // MARK: - Safetensors

  private func tensors(_ header: String, data: Int = 16, length: UInt64? = nil) throws -> [String: Tensor] {
    let file = folder.appendingPathComponent("x.safetensors")
    let stated = withUnsafeBytes(of: (length ?? UInt64(header.utf8.count)).littleEndian) { Data($0) }
    try (stated + Data(header.utf8) + Data(repeating: 1, count: data)).write(to: file)
    return try Safetensors.read(file)
  }

  private func tensor(_ shape: String, _ offsets: String, _ dtype: String = "U8") throws -> [String: Tensor] {
    try tensors("{\"a\": {\"dtype\": \"\(dtype)\", \"shape\": \(shape), \"data_offsets\": \(offsets)}}")
  }

  func testSafetensors() throws {
    XCTAssertEqual(try tensor("[4]", "[0, 4]")["a"]?.wholes(), [1, 1, 1, 1])
    XCTAssertEqual(try tensor("[0]", "[4, 4]")["a"]?.count, 0)
    for (shape, offsets, words) in [
      ("[4]", "[14, 18]", "lies outside"), ("[4]", "[4, 0]", "lies outside"), ("[4]", "[0]", "lies outside"),
      ("[4]", "[-4, 0]", "not in"), ("[4]", "[0, 9223372036854775807]", "lies outside"),
      ("[4]", "[0, 9223372036854775808]", "no whole number"), ("[5]", "[0, 4]", "not as many bytes"),
      ("[-1]", "[0, 4]", "not in"), ("[2147483647, 2147483647, 2147483647]", "[0, 4]", "cannot have the shape"),
      ("\"4\"", "[0, 4]", "is no list"), ("[1.5]", "[0, 4]", "no whole number"),
    ] {
      assertTrouble(words) { try tensor(shape, offsets) }
    }
    assertTrouble("not exchanged") { try tensor("[2]", "[0, 4]", "BF16") }
    assertTrouble("has a header of") { try tensors("{}", data: 17 << 20, length: 17 << 20) }
    assertTrouble("truncated") { try tensors("{}", length: 1000) }
    assertTrouble("truncated") { try tensors("{}", length: UInt64.max) }
    assertTrouble("no header") { try tensors("[]") }
    assertTrouble("is no object") { try tensors("{\"a\": 1}") }
    assertTrouble("is missing") { try tensors("{\"a\": {}}") }
    for count in [0, 7] {
      let file = folder.appendingPathComponent("short.safetensors")
      try Data(repeating: 0, count: count).write(to: file)
      assertTrouble("no safetensors file") { try Safetensors.read(file) }
    }
    assertTrouble("no plain file") { try Safetensors.read(folder) }
  }

  func testWhatIsWrittenIsRead() throws {
    let file = folder.appendingPathComponent("x.safetensors")
    let given = [
      "flags": try Tensor(.bool, [3]), "positions": try Tensor(.int64, [1, 2], wholes: [-7, 1 << 40]),
      "hidden": try Tensor([1, 3], floats: [1.5, -0.0, .infinity]), "none": try Tensor(.int32, [0, 4]),
    ]
    try Safetensors.write(given, to: file)
    let read = try Safetensors.read(file)
    XCTAssertEqual(Set(read.keys), Set(given.keys))
    for (name, tensor) in given {
      XCTAssertEqual(read[name]?.dtype, tensor.dtype)
      XCTAssertEqual(read[name]?.shape, tensor.shape)
      XCTAssertEqual(read[name].map { [UInt8]($0.bytes) }, [UInt8](tensor.bytes))
    }
  }

  func testTensorsRefuseWhatDoesNotFit() throws {
    let cache = try Tensor(.float32, [1, 2, 5, 3])
    assertTrouble("do not go into") { try cache.write(Tensor(.float32, [1, 2, 4, 3]), from: 0..<4, at: 2) }
    assertTrouble("do not go into") { try cache.write(Tensor(.float32, [1, 2, 4, 3]), from: 0..<5, at: 0) }
    assertTrouble("do not go into") { try cache.write(Tensor(.float16, [1, 2, 4, 3]), from: 0..<4, at: 0) }
    assertTrouble("has no rows") { try Tensor(.float32, [1, 2]).rows(1..<3) }
    assertTrouble("cannot have the shape") { try Tensor(.float32, [-1]) }
    assertTrouble("do not fill") { try Tensor([2], floats: [1]) }
    assertTrouble("no int32") { try Tensor(.int32, [1], wholes: [1 << 40]) }
    assertTrouble("no whole number") { try Tensor([1], floats: [.nan]).wholes() }
    let halves = try Tensor(.float16, [6])
    for (i, bits) in [0x3C00, 0xC000, 0x0001, 0x7BFF, 0x8000, 0x7C00].enumerated() {
      halves.bytes.storeBytes(of: UInt16(bits), toByteOffset: i * 2, as: UInt16.self)
    }
    XCTAssertEqual(try halves.floats(), [1, -2, 0x1p-24, 65504, -0.0, .infinity])
  }

  func testStrides() throws {
    let padded: [Float] = [1, 2, 3, 0, 4, 5, 6, 0]
    try padded.withUnsafeBytes { bytes in
      let read = try Tensor(.float32, [1, 2, 3], from: bytes, strides: [8, 4, 1])
      XCTAssertEqual(try read.floats(), [1, 2, 3, 4, 5, 6])
      let turned = try Tensor(.float32, [3, 2], from: bytes, strides: [1, 4])
      XCTAssertEqual(try turned.floats(), [1, 4, 2, 5, 3, 6])
      assertTrouble("does not fit") { try Tensor(.float32, [2, 3], from: bytes, strides: [6, 1]) }
      assertTrouble("does not fit") { try Tensor(.float32, [2, 3], from: bytes, strides: [1]) }
      assertTrouble("cannot lie") { try Tensor(.float32, [2, 3], from: bytes, strides: [-1, 1]) }
      assertTrouble("cannot lie") { try Tensor(.float32, [3, 3], from: bytes, strides: [Int.max, Int.max]) }
    }
    var target = [Float](repeating: 9, count: 8)
    try target.withUnsafeMutableBytes {
      try Tensor([2, 3], floats: [1, 2, 3, 4, 5, 6]).copy(to: $0, strides: [4, 1])
    }
    XCTAssertEqual(target, [1, 2, 3, 9, 4, 5, 6, 9])
  }

  // MARK: - Manifest and job

  private let graph = """
    [{"name": "vision_encoder", "file": "a.pte", "engine": "executorch",
      "inputs": [{"name": "pixel_values", "shape": [1, 3, 2, 2], "dtype": "float32"}],
      "outputs": [{"name": "hidden", "shape": [1, 7, 4], "dtype": "float32"}]}]
    """

  private func manifest(_ text: String, _ from: String = "", _ to: String = "") throws -> Manifest {
    let json = try exampleManifest(graphs: parse(text), before: 3, firstText: 13, tokens: 90, chunk: 8)
    guard !from.isEmpty, case .object(let members) = json else { return try Manifest(json, .standard) }
    return try Manifest(
      .object(members.map { $0.name == from ? .init(name: from, value: try parse(to)) : $0 }), .standard)
  }

  func testManifests() throws {
    XCTAssertEqual(try manifest(graph).graph("vision_encoder")?.file, "a.pte")
    for (from, to, words) in [
      ("a.pte", "../a.pte", "no plain path"), ("a.pte", "/a.pte", "no plain path"), ("a.pte", "a//b", "no plain path"),
      ("float32", "bfloat16", "not exchanged"), ("[1, 7, 4]", "[1, 0, 4]", "not in"),
      ("[1, 7, 4]", "[1048576, 1048576, 4]", "cannot have the shape"), ("\"name\": \"hidden\", ", "", "is missing"),
    ] {
      assertTrouble(words) { try manifest(graph.replacingOccurrences(of: from, with: to)) }
    }
    for (field, value, words) in [
      ("schema_version", "3", "use app and bundle of one release"), ("schema_version", "null", "is missing"),
      ("prune", "{\"cut\": 1, \"image_tokens\": 10, \"keep\": 11, \"grid\": [2, 5]}", "not in"),
      ("prune", "{\"cut\": 1, \"image_tokens\": 10, \"keep\": 4, \"grid\": [2147483647, 2147483647]}", "does not hold"),
      ("image", "{\"tiles\": {\"resize\": [2, 2], \"grid\": [1, 1]}}", "in tiles, which this app cannot cut"),
      ("graphs", "[]", "no graphs"), ("frame", "[]", "no object"), ("name", "1", "is no text"),
      ("text", "{\"tokens\": 1e3, \"chunk\": 8}", "no whole number"),
    ] {
      assertTrouble(words) { try manifest(graph, field, value) }
    }
    assertTrouble("does not list a.pte") { try manifest(graph).checkFiles(in: folder) }
  }

  func testKeeps() throws {
    func keep(_ count: Int, _ name: String) -> String {
      "{\"prune\": {\"cut\": 1, \"image_tokens\": 10, \"keep\": \(count), \"grid\": [2, 5]}, \"graph\": \"\(name)\", "
        + "\"golden\": \"\(name).safetensors\"}"
    }
    let graphs = ["v4", "v8"].map { graph.dropFirst().dropLast().replacingOccurrences(of: "vision_encoder", with: $0) }
    let json = try exampleManifest(
      graphs: parse("[\(graphs.joined(separator: ","))]"), before: 3, firstText: 13, tokens: 90, chunk: 8)
    guard case .object(let members) = json else { return XCTFail() }
    let whole = Json.object(members + [.init(name: "keeps", value: try parse("[\(keep(4, "v4")), \(keep(8, "v8"))]"))])
    XCTAssertEqual(try Manifest(whole, .standard).keeps, [4, 8])
    for chosen in [try Manifest(whole, .keep(8)), try Manifest(whole, .vision("v8"))] {
      XCTAssertEqual(chosen.prune.keep, 8)
      XCTAssertEqual(chosen.graphs.map(\.name), ["vision_encoder"])
      XCTAssertEqual(chosen.graphs.map(\.stored), ["v8"])
      XCTAssertTrue(chosen.graphs[0].sharesFile)
    }
    assertTrouble("has the keeps 4, 8") { try Manifest(whole, .keep(5)) }
  }

  func testJobs() throws {
    let least = "{\"id\": \"0123456789abcdef\", \"bundle\": \"b\", \"vision\": \"v\", \"steps\": []}"
    XCTAssertEqual(try Job(parse(least)).vision, "v")
    for (from, to, words) in [
      ("0123456789abcdef", "0123456789ABCDEF", "16 lower-case"),
      ("\"steps\": []", "\"steps\": [], \"x\": 1", "unknown field"),
      ("\"steps\": []", "\"steps\": 1", "is no list"), ("\"steps\": []", "\"steps\": [], \"threads\": 257", "not in"),
      ("\"steps\": []", "\"steps\": [], \"folder\": \"../x\"", "is not bundle"),
      ("\"steps\": []", "\"steps\": [], \"job_version\": 2", "of one release"),
      ("\"steps\": []", "\"steps\": [], \"answer\": {\"question\": [], \"new_tokens\": 1}", "is empty"),
      ("\"steps\": []", "\"steps\": [], \"answer\": {\"question\": [1], \"new_tokens\": 0}", "not in"),
      ("\"steps\": []", "\"steps\": [], \"gate\": {\"most_celsius\": 0}", "not in"),
    ] {
      assertTrouble(words) { try Job(parse(least.replacingOccurrences(of: from, with: to))) }
    }
  }

  // MARK: - Tokenizer, photo, sampling

  func testTokenizers() throws {
    func tokenizer(_ extra: String, model: String = "\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": []") throws
      -> Tokenizer
    {
      try Tokenizer(parse("{\"model\": {\(model)}\(extra.isEmpty ? "" : ", ")\(extra)}"))
    }
    XCTAssertEqual(try tokenizer("").encode("aba"), [0, 0])
    for (extra, words) in [
      ("\"normalizer\": {\"type\": \"Lowercase\"}", "kind Lowercase"),
      ("\"pre_tokenizer\": {\"type\": \"BertPreTokenizer\"}", "kind BertPreTokenizer"),
      ("\"decoder\": {\"type\": \"WordPiece\"}", "kind WordPiece"),
      (
        "\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"(\"}, \"behavior\": \"Isolated\"}",
        "pattern"
      ),
    ] {
      assertTrouble(words) { try tokenizer(extra) }
    }
    for (model, words) in [
      ("\"type\": \"Unigram\", \"vocab\": []", "kind Unigram"), ("\"vocab\": {\"a\": -1}, \"merges\": []", "no id"),
      ("\"vocab\": {\"a\": 0}, \"merges\": [[\"a\", \"b\"]]", "vocabulary lacks"),
      ("\"vocab\": {\"a\": 0}, \"merges\": [\"a\"]", "no pair"),
      ("\"vocab\": {}, \"merges\": [], \"unk_token\": \"x\"", "unk_token"),
      ("\"vocab\": {}, \"merges\": [], \"end_of_word_suffix\": \"x\"", "end_of_word_suffix"),
    ] {
      assertTrouble(words) { try tokenizer("", model: model) }
    }
    // Ids that no token has, and bytes that make no character, spoil nothing.
    XCTAssertEqual(try tokenizer("").decode([5, 0, -1, Int.max]), "a")
    // Two ways to write one letter are two tokens.
    let letters = "\"vocab\": {\"\\u00c5\": 0, \"\\u212b\": 1}, \"merges\": []"
    XCTAssertEqual(try tokenizer("", model: letters).encode("\u{C5}\u{212B}"), [0, 1])
  }

  func testSteps() throws {
    func ids(_ step: String, _ text: String, _ pieces: [String]) throws -> [Int] {
      let vocabulary = pieces.enumerated().map { "\"\($1)\": \($0)" }.joined(separator: ", ")
      let model = "{\"type\": \"BPE\", \"ignore_merges\": true, \"vocab\": {\(vocabulary)}, \"merges\": []}"
      return try Tokenizer(parse("{\"model\": \(model), \"pre_tokenizer\": \(step)}")).encode(text)
    }
    func split(_ behaviour: String, _ more: String = "") -> String {
      "{\"type\": \"Split\", \"pattern\": {\"String\": \"-\"}, \"behavior\": \"\(behaviour)\"\(more)}"
    }
    XCTAssertEqual(try ids(split("Removed"), "ab--cd", ["ab", "cd", "--"]), [0, 1])
    XCTAssertEqual(try ids(split("Isolated"), "ab--cd", ["ab", "cd", "-"]), [0, 2, 2, 1])
    XCTAssertEqual(try ids(split("Contiguous"), "ab--cd", ["ab", "cd", "--"]), [0, 2, 1])
    XCTAssertEqual(try ids(split("MergedWithPrevious"), "ab--cd", ["ab-", "cd", "-"]), [0, 2, 1])
    XCTAssertEqual(try ids(split("MergedWithNext"), "ab--cd", ["ab", "-cd", "-"]), [0, 2, 1])
    XCTAssertEqual(try ids(split("Removed", ", \"invert\": true"), "ab--cd", ["ab", "cd", "-"]), [2, 2])
    let digits = "{\"type\": \"Digits\", \"individual_digits\": true}"
    XCTAssertEqual(try ids(digits, "ab12", ["ab", "1", "2", "12"]), [0, 1, 2])
    let metaspace = "{\"type\": \"Metaspace\", \"replacement\": \"_\", \"prepend_scheme\": \"always\"}"
    XCTAssertEqual(try ids(metaspace, "ab cd", ["_ab", "_cd"]), [0, 1])
  }

  func testPrompts() throws {
    let json =
      "{\"model\": {\"vocab\": {\"a\": 0, \" \": 1}, \"merges\": []}, \"added_tokens\": [{\"id\": 9, \"content\": \"<image>\", \"special\": true}]}"
    let tokenizer = try Tokenizer(parse(json))
    func prompt(_ info: String) throws -> Prompt { try Prompt(tokenizer, PromptInfo(Fields(parse(info), "prompt"))) }
    let sound = try prompt("{\"suffix_text\": \"{question}a\", \"special_ids\": {\"image\": 9}}")
    XCTAssertEqual(try sound.ids(of: "aa"), [0, 0, 0])
    assertTrouble("has no Jinja") { try prompt("{\"suffix_text\": null, \"special_ids\": {\"image\": 9}}") }
    assertTrouble("has no Jinja") { try prompt("{\"suffix_text\": \"a\", \"special_ids\": {\"image\": 9}}") }
    assertTrouble("another model") { try prompt("{\"suffix_text\": \"{question}\", \"special_ids\": {\"image\": 8}}") }
    assertTrouble("is empty") { try sound.ids(of: " \n\u{1C}") }
    assertTrouble("a second image") { try sound.ids(of: "a<image>a") }
  }

  func testPhotos() throws {
    assertTrouble("128 megapixels") { try Photo(height: Int.max, width: 2, pixels: []) }
    assertTrouble("128 megapixels") { try Photo(height: 0, width: 2, pixels: []) }
    assertTrouble("three bytes") { try Photo(height: 2, width: 2, pixels: [1]) }
    assertTrouble("50 times") { try Photo(height: 1, width: 51, pixels: [UInt8](repeating: 0, count: 153)) }
    assertTrouble("not uint8") { try Photo(Tensor(.float32, [2, 2, 3])) }
  }

  func testLogits() throws {
    var greedy = try Sampling()
    assertTrouble("not a number") { try greedy.choose([0, .nan]) }
    assertTrouble("minus infinity") { try greedy.choose([-.infinity, -.infinity]) }
    assertTrouble("no logits") { try greedy.choose([]) }
    assertTrouble("temperature") { try Sampling(temperature: -1) }
    assertTrouble("temperature") { try Sampling(temperature: .nan) }
    var drawn = try Sampling(temperature: 1e-300)
    XCTAssertEqual(try drawn.choose([0, .infinity, 5]), 1)
  }
}
