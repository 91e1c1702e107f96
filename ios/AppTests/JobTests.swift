// Runs the job in the documents folder on the device, as a test of Xcode's.

import BenchCore
import Foundation
import XCTest

@testable import Pruneport

final class JobTests: XCTestCase {
  func testRunsTheJobInTheDocumentsFolder() throws {
    let environment = ProcessInfo.processInfo.environment
    let name = environment["PRUNEPORT_TEST_JOB"] ?? "job"
    let job = try XCTUnwrap(HeadlessJob(environment: ["PRUNEPORT_JOB": name], arguments: []))
    guard FileManager.default.fileExists(atPath: job.folder.path) else {
      throw XCTSkip("there is no job in \(job.folder.path); ios/README.md says how to copy one there")
    }
    let findings = try job.run()
    XCTAssertNil(findings.trouble?.message)
    for step in findings.steps { XCTAssertNil(step.trouble?.message, "\(step.graph) at \(step.step)") }
    XCTAssertNil(findings.answer?.trouble?.message)
  }
}
