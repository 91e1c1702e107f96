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

  func testAHotPhoneIsWaitedFor() throws {
    let device = TestDevice()
    device.celsius = 50
    XCTAssertEqual(device.condition().celsius, 50)
    XCTAssertEqual(median([3, 1, 2, 10]), 2.5)
    XCTAssertNil(median([]))
  }
}
