// A whole job: the one in $PRUNEPORT_JOB, whose findings go to $PRUNEPORT_OUT, and ones that cannot be run.

import Foundation
import XCTest

@testable import BenchCore

final class JobTests: XCTestCase {
  func testRunsTheJobOfTheEnvironment() throws {
    let environment = ProcessInfo.processInfo.environment
    guard let job = environment["PRUNEPORT_JOB"], let out = environment["PRUNEPORT_OUT"] else {
      throw XCTSkip("tests/ios/test_core.py makes the job")
    }
    let device = TestDevice()
    device.celsius = 30
    var said: [String] = []
    let run = try JobRun(
      in: URL(fileURLWithPath: job), device: device, engines: [SumEngine("coreml"), SumEngine("executorch")],
      app: ("BenchCore tests", "1"), say: { said.append($0) })
    let findings = try run.run(to: URL(fileURLWithPath: out))
    XCTAssertEqual(said.first, "opening the graphs")
    XCTAssertEqual(findings.gate?.passed, true)
  }

  func testWhatCannotBeRunIsSaid() throws {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    func run() throws -> Findings {
      try JobRun(in: folder, device: TestDevice(), engines: [], app: ("tests", "1")).run(to: folder)
    }
    XCTAssertThrowsError(try run())
    let job = "{\"id\": \"0123456789abcdef\", \"bundle\": \"b\", \"vision\": \"v\", \"steps\": []}"
    try Data(job.utf8).write(to: folder.appendingPathComponent("job.json"))
    XCTAssertEqual(try run().trouble?.message, "inputs.safetensors cannot be read")
    try Safetensors.write(["a": Tensor(.int8, [1])], to: folder.appendingPathComponent("inputs.safetensors"))
    XCTAssertEqual(try run().trouble?.message, "manifest.json cannot be read")
    let written = try Json.read(folder.appendingPathComponent("findings.json"), limit: 1 << 20)
    XCTAssertEqual(try Fields(written, "").text("job"), "0123456789abcdef")
  }

  /// A folder with a job that times one graph behind a gate, and answers with a bundle that cannot.
  private func timedJob() throws -> URL {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    try FileManager.default.createDirectory(
      at: folder.appendingPathComponent("bundle"), withIntermediateDirectories: true)
    let manifest = """
      {"schema_version": 2, "name": "walk", "model": "tiny", "target": {"backend": "xnnpack", "precision": "fp32"},
       "prune": {"cut": 1, "image_tokens": 10, "keep": 4, "grid": [2, 5]},
       "image": {"size": [2, 2], "resize_shortest": 2, "rescale": 0.5, "mean": [0, 0, 0], "std": [1, 1, 1]},
       "prompt": {}, "frame": {"before": 3, "image": 10, "first_text": 13}, "text": null,
       "files": {"a.pte": {"sha256": "", "size_bytes": 3}},
       "graphs": [{"name": "vision_encoder", "file": "a.pte", "engine": "executorch",
         "inputs": [{"name": "pixel_values", "shape": [1, 3, 2, 2], "dtype": "float32"}],
         "outputs": [{"name": "hidden", "shape": [1, 7, 4], "dtype": "float32"}]}]}
      """
    let job = """
      {"id": "0123456789abcdef", "bundle": "walk 0", "vision": "vision_encoder",
       "steps": [{"graph": "vision_encoder", "stored": "vision_encoder", "step": "vision_encoder"},
                 {"graph": "lm_head", "stored": "lm_head", "step": "text_prefill"}],
       "answer": {"question": [1], "new_tokens": 1}, "timing": {"warmup": 0, "runs": 2},
       "gate": {"most_celsius": 37, "wait_s": 0.5}}
      """
    try Data(manifest.utf8).write(to: folder.appendingPathComponent("bundle/manifest.json"))
    try Data("abc".utf8).write(to: folder.appendingPathComponent("bundle/a.pte"))
    try Data(job.utf8).write(to: folder.appendingPathComponent("job.json"))
    let values = try Tensor([1, 3, 2, 2], floats: [Float](repeating: 1, count: 12))
    let inputs = ["in/vision_encoder/vision_encoder/pixel_values": values, "pixel_values": values]
    try Safetensors.write(inputs, to: folder.appendingPathComponent("inputs.safetensors"))
    return folder
  }

  func testAHotPhoneIsWaitedFor() throws {
    let folder = try timedJob()
    defer { try? FileManager.default.removeItem(at: folder) }
    let device = TestDevice()
    func gate() throws -> Findings.Gate {
      let findings = try JobRun(
        in: folder, device: device, engines: [SumEngine("executorch")], app: ("tests", "1")
      ).run(to: folder)
      XCTAssertNil(findings.trouble)
      XCTAssertEqual(findings.steps[0].runMs.count, 2)
      XCTAssertEqual(findings.steps[1].trouble?.message, "walk has no lm_head; export it whole, without --only")
      XCTAssertEqual(findings.answer?.trouble?.message, "walk has no text graphs and cannot answer")
      return try XCTUnwrap(findings.gate)
    }
    device.celsius = 36
    XCTAssertEqual(try gate().passed, true)
    device.celsius = 50
    let hot = try gate()
    XCTAssertEqual(hot.passed, false)
    XCTAssertGreaterThanOrEqual(hot.waitedS, 0.5)
    // Without a thermometer the system's own word counts, and nobody can say that it is cool enough.
    device.celsius = nil
    XCTAssertNil(try gate().passed)
    device.isThrottled = true
    let throttled = try gate()
    XCTAssertNil(throttled.passed)
    XCTAssertGreaterThanOrEqual(throttled.waitedS, 0.5)
  }

  func testMedians() {
    XCTAssertEqual(median([3, 1, 2, 10]), 2.5)
    XCTAssertEqual(median([3, 1, 2]), 2)
    XCTAssertNil(median([]))
  }
}
