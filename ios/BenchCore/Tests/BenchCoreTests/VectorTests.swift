// Holds the core against what runtime/ makes of small inputs: tests/phones/vectors.

import Foundation
import XCTest

@testable import BenchCore

/// The cases of one file of vectors, in $PRUNEPORT_VECTORS or where they lie in the checkout.
func vectors(_ name: String) throws -> [Json] {
  let given = ProcessInfo.processInfo.environment["PRUNEPORT_VECTORS"].map { URL(fileURLWithPath: $0) }
  let above = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in url.deletingLastPathComponent() }
  let folder = given ?? above.appendingPathComponent("tests/phones/vectors")
  let json = try Json.read(folder.appendingPathComponent("\(name).json"), limit: 64 << 20)
  guard case .list(let values) = json else { throw Trouble("\(name).json is no list") }
  XCTAssertFalse(values.isEmpty)
  return values
}

private func cases(_ name: String) throws -> [Fields] { try vectors(name).map { try Fields($0, name) } }

extension Fields {
  fileprivate func base64(_ name: String) throws -> [UInt8] {
    [UInt8](try XCTUnwrap(Data(base64Encoded: text(name))))
  }

  fileprivate func ids(_ name: String) throws -> [Int] { try wholes(name, 0...Int(Int32.max)) }

  fileprivate func doubles(_ name: String) throws -> [Double] {
    try numbers(name, -1e30...1e30, count: list(name).count)
  }
}

final class VectorTests: XCTestCase {
  func testPhotosAreWhatPillowMakesOfThem() throws {
    for entry in try cases("photos") {
      let info = try ImageInfo(entry.fields("image"))
      let photo = try Photo(
        height: entry.whole("height", 1...10_000), width: entry.whole("width", 1...10_000),
        pixels: entry.base64("photo"))
      // One grey level: Pillow resizes rows or columns first, whichever is less work, and rounds in between.
      let (got, expected) = (try photo.view(info).pixels, try entry.base64("view"))
      XCTAssertEqual(got.count, expected.count)
      let worst = zip(got, expected).map { abs(Int($0) - Int($1)) }.max()
      XCTAssertLessThanOrEqual(try XCTUnwrap(worst), 1, "\(photo.width) x \(photo.height)")
      let values = try photo.pixelValues(info)
      XCTAssertEqual(values.shape, [1, 3, info.height, info.width])
      let area = info.height * info.width
      for (channel, expected) in try entry.doubles("pixel_values_corner").enumerated() {
        let level = Double(info.rescale / info.std[channel])
        XCTAssertEqual(Double(try values.floats()[channel * area]), expected, accuracy: level + 1e-6)
      }
    }
  }

  func testQuestionsBecomeIdsAndIdsText() throws {
    for entry in try cases("tokens") {
      let name = try entry.text("name")
      let tokenizer = try Tokenizer(entry.value("tokenizer"))
      let prompt = try Prompt(tokenizer, PromptInfo(entry.fields("prompt")))
      for question in try entry.objects("questions", { try Fields($0, $1) }) {
        XCTAssertEqual(try prompt.ids(of: question.text("text")), try question.ids("ids"), name)
      }
      for answer in try entry.objects("answers", { try Fields($0, $1) }) {
        var stream = prompt.stream()
        var said = ""
        for id in try answer.ids("ids") { said.unicodeScalars += stream.append(id).unicodeScalars }
        said.unicodeScalars += stream.finish().unicodeScalars
        XCTAssertEqual(ByteText(said), ByteText(try answer.text("text")), "\(name): \(said)")
      }
    }
  }

  func testTheWalkCallsTheSameGraphsWithTheSame() throws {
    for entry in try cases("walks") {
      let room = try entry.whole("room", 1...1000)
      let manifest = try Manifest(
        exampleManifest(
          graphs: entry.value("graphs"), before: entry.whole("before", 0...100),
          firstText: entry.whole("first_text", 1...100), tokens: room, chunk: 8), .standard)
      let calls = Calls()
      let answers = try Answers(Graphs(manifest, runners: manifest.graphs.map { SumGraph($0, calls) }))
      XCTAssertEqual(answers.room, room)
      XCTAssertEqual(answers.cacheBytes, try entry.whole("cache_bytes", 1...1_000_000))
      var seen = 0
      for said in try entry.objects("answers", { try Fields($0, $1) }) {
        let photo = try said.whole("photo", 1...2)
        if photo != seen {
          try answers.see(Tensor([1, 3, 2, 2], floats: [Float](repeating: Float(photo), count: 12)))
          seen = photo
        }
        let ids = try answers.answer(
          said.ids("question"), most: said.whole("count", 1...100), sampling: Sampling(), pastEnd: true)
        XCTAssertEqual(ids, try said.ids("ids"))
        XCTAssertEqual(answers.times.tokens.count, ids.count - 1)
      }
      let expected = try entry.list("calls").map { call -> Call in
        guard case .list(let parts) = call, parts.count == 3, case .text(let graph) = parts[0],
          case .whole(let sum) = parts[1], case .list(let shapes) = parts[2]
        else { throw Trouble("no call") }
        let sizes = try shapes.map { try Fields(.object([.init(name: "shape", value: $0)]), "").ids("shape") }
        return Call(graph: graph, sum: Int(sum), shapes: sizes)
      }
      XCTAssertEqual(calls.all.count, expected.count)
      for (got, wanted) in zip(calls.all, expected) { XCTAssertEqual(got, wanted) }
    }
  }

  func testDrawsAreAsOftenAsTheyShouldBe() throws {
    for entry in try cases("samplings") {
      let logits = try entry.doubles("logits").map { Float($0) }
      var sampling = try Sampling(
        temperature: entry.number("temperature", 0...100), topP: entry.number("top_p", 0...1), seed: 7)
      let draws = 20_000
      var counts = [Int](repeating: 0, count: logits.count)
      for _ in 0..<draws { counts[try sampling.choose(logits)] += 1 }
      for (count, share) in zip(counts, try entry.doubles("shares")) {
        XCTAssertEqual(Double(count) / Double(draws), share, accuracy: 0.015)
        if share == 0 { XCTAssertLessThan(count, 20) }
      }
    }
  }

  func testJobsAreRead() throws {
    let jobs = try vectors("jobs").map { try Job($0) }
    let (least, whole) = (jobs[0], jobs[1])
    XCTAssertEqual(whole.steps.map(\.stored), ["vision_encoder_keep64"])
    XCTAssertEqual(whole.answer?.question, [5, 6, 7])
    XCTAssertEqual(whole.timing?.runs, 3)
    XCTAssertEqual(whole.twin?.vision, "vision_encoder")
    XCTAssertEqual(whole.gate?.mostCelsius, 37)
    XCTAssertNil(least.answer)
    XCTAssertEqual(least.threads, 0)
  }
}

/// A manifest around graphs, with the least of everything else.
func exampleManifest(graphs: Json, before: Int, firstText: Int, tokens: Int, chunk: Int) throws -> Json {
  let text = """
    {"schema_version": 2, "name": "walk", "model": "tiny", "target": {"backend": "xnnpack", "precision": "fp32"},
     "prune": {"cut": 1, "image_tokens": 10, "keep": 4, "grid": [2, 5]},
     "image": {"size": [2, 2], "resize_shortest": 2, "rescale": 0.5, "mean": [0, 0, 0], "std": [1, 1, 1]},
     "prompt": {"prefix_ids": []}, "frame": {"before": \(before), "image": 10, "first_text": \(firstText)},
     "text": {"tokens": \(tokens), "chunk": \(chunk)}}
    """
  guard case .object(let members) = try Json.parse(Data(text.utf8), called: "manifest.json") else {
    throw Trouble("no object")
  }
  return .object(members + [.init(name: "graphs", value: graphs)])
}
