// Sound files with something changed at random, by a fixed seed: whatever comes of them, it is no crash.

import Foundation
import XCTest

@testable import BenchCore

/// Numbers that are the same in every run.
private struct Dice {
  var state: UInt64

  mutating func below(_ limit: Int) -> Int {
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return Int((state >> 33) % UInt64(limit))
  }
}

extension Json {
  /// How many values this is made of, itself among them.
  fileprivate var size: Int {
    switch self {
    case .list(let values): return values.reduce(1) { $0 + $1.size }
    case .object(let members): return members.reduce(1) { $0 + $1.value.size }
    default: return 1
    }
  }

  /// The same with its `number`-th value put through `change`; nil leaves that value out.
  fileprivate func changed(_ number: inout Int, _ change: (Json) -> Json?) -> Json? {
    number -= 1
    if number < 0 { return number == -1 ? change(self) : self }
    switch self {
    case .list(let values): return .list(values.compactMap { $0.changed(&number, change) })
    case .object(let members):
      return .object(
        members.compactMap { member in
          member.value.changed(&number, change).map { Member(name: member.name, value: $0) }
        })
    default: return self
    }
  }
}

final class MutationTests: XCTestCase {
  private func graphs() throws -> Json {
    let walks = try vectors("walks")
    return try Fields(walks[0], "walks").value("graphs")
  }

  /// Another number where one was, or the value left out.
  private func mutated(_ json: Json, _ dice: inout Dice) -> Json {
    var place = dice.below(json.size)
    let number = Int64(dice.below(16)) - 1
    let isLeftOut = dice.below(4) == 0
    return json.changed(&place) { value in
      if isLeftOut { return nil }
      if case .whole = value { return .whole(number) }
      return dice.state % 3 == 0 ? .null : value
    } ?? .null
  }

  func testGraphsThatDoNotBelongTogether() throws {
    let sound = try graphs()
    var dice = Dice(state: 1)
    var (walked, refused) = (0, 0)
    for _ in 0..<1500 {
      var json = sound
      for _ in 0...dice.below(3) { json = mutated(json, &dice) }
      do {
        let manifest = try Manifest(
          exampleManifest(graphs: json, before: 3, firstText: 13, tokens: 90, chunk: 8), .standard)
        let calls = Calls()
        let answers = try Answers(Graphs(manifest, runners: manifest.graphs.map { SumGraph($0, calls) }))
        try answers.see(Tensor([1, 3, 2, 2], floats: [Float](repeating: 1, count: 12)))
        try answers.answer([5, 6, 7, 8, 9, 10, 11, 12, 13], most: 3, sampling: Sampling())
        walked += 1
      } catch is Trouble {
        refused += 1
      }
    }
    XCTAssertGreaterThan(walked, 50)
    XCTAssertGreaterThan(refused, 500)
  }

  func testBytesThatWereChanged() throws {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    let file = folder.appendingPathComponent("x.safetensors")
    try Safetensors.write(
      ["a": Tensor([1, 3], floats: [1, 2, 3]), "b": Tensor(.int64, [2], wholes: [1, 2])], to: file)
    let sound = try Data(contentsOf: file)
    let text = """
      {"id": "0123456789abcdef", "bundle": "b", "vision": "v", "steps": [{"graph": "g", "stored": "s", "step": "t"}],
       "answer": {"question": [1, 2], "new_tokens": 4}, "gate": {"most_celsius": 3.7e1}}
      """
    var dice = Dice(state: 2)
    for _ in 0..<2000 {
      var bytes = sound
      for _ in 0...dice.below(3) { bytes[dice.below(sound.count)] = UInt8(dice.below(256)) }
      try bytes.prefix(dice.below(8) == 0 ? dice.below(bytes.count) : bytes.count).write(to: file)
      if let tensors = try? Safetensors.read(file) {
        for tensor in tensors.values { _ = [UInt8](tensor.bytes) }
      }
      var letters = Data(text.utf8)
      for _ in 0...dice.below(2) { letters[dice.below(letters.count)] = UInt8(dice.below(256)) }
      _ = try? Job(Json.parse(letters, called: "job.json"))
    }
  }

  func testTokenizersThatWereChanged() throws {
    let cases = try vectors("tokens").map { try Fields($0, "tokens") }
    var dice = Dice(state: 3)
    for entry in cases {
      guard case .object(let members) = try entry.value("tokenizer") else { return XCTFail() }
      for _ in 0..<8 {
        // The steps and the added tokens; the vocabulary is long, and all of one kind.
        let changed = members.map { member in
          member.name == "model" ? member : Json.Member(name: member.name, value: mutated(member.value, &dice))
        }
        guard let tokenizer = try? Tokenizer(.object(changed)) else { continue }
        let ids = tokenizer.encode("  How many <image> red circles? \u{1F642}e\u{301}\u{0} 12")
        _ = tokenizer.decode(ids + [-1, 1 << 40])
      }
    }
  }
}
