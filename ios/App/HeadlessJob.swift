// A job without a screen: the one that the environment or the arguments name, run and written down.

import BenchCore
import Foundation

/// The folder of a job in the documents folder, and the one that its findings go to.
struct HeadlessJob: Sendable {
  let folder: URL
  let findings: URL

  /// The job that PRUNEPORT_JOB or `--job` names; nil for neither.
  init?(environment: [String: String], arguments: [String]) {
    let named = arguments.firstIndex(of: "--job").flatMap { arguments.dropFirst($0 + 1).first }
    guard let name = environment["PRUNEPORT_JOB"] ?? named, Self.isPlain(name) else { return nil }
    folder = documents().appendingPathComponent(name)
    findings = documents().appendingPathComponent("\(name)-findings")
  }

  /// True for the name of a folder that cannot lead out of the documents folder.
  private static func isPlain(_ name: String) -> Bool {
    !name.isEmpty && name != "." && name != ".." && !name.contains("/")
  }

  /// Deletes the jobs that a computer sent before this one, which devicectl cannot: their names are 16 hexadecimal digits.
  private func forgetOthers() {
    let manager = FileManager.default
    for name in (try? manager.contentsOfDirectory(atPath: documents().path)) ?? [] {
      let job = name.hasSuffix("-findings") ? String(name.dropLast("-findings".count)) : name
      guard job.count == 16, job.allSatisfy({ $0.isHexDigit }), job != folder.lastPathComponent else { continue }
      try? manager.removeItem(at: documents().appendingPathComponent(name))
    }
  }

  /// Writes a line to the console at once, where `print` would wait for more.
  static func tell(_ line: String) { FileHandle.standardOutput.write(Data("\(line)\n".utf8)) }

  /// Runs it; a line a stage goes to the console. Throws Trouble where not even findings could be written.
  @discardableResult
  func run() throws -> Findings {
    let version = Bundle.main.object(forInfoDictionaryKey: "CFBundleShortVersionString") as? String ?? "0"
    // Old findings would be taken for this job's.
    try? FileManager.default.removeItem(at: findings)
    forgetOthers()
    let run = try JobRun(
      in: folder, device: Phone(), engines: allEngines(), app: ("pruneport iOS app", version)
    ) { Self.tell($0) }
    return try run.run(to: findings)
  }
}
