// The app: a screen to ask about photos, or a job without one.

import BenchCore
import Foundation
import SwiftUI
import UIKit

@main
struct PruneportApp: App {
  private let job = HeadlessJob(
    environment: ProcessInfo.processInfo.environment, arguments: ProcessInfo.processInfo.arguments)

  var body: some Scene {
    WindowGroup {
      if let job {
        Text("A job is running; its findings go to \(job.findings.lastPathComponent).").task { await Self.run(job) }
      } else {
        Screen()
      }
    }
  }

  /// Runs the job and ends the app, so that whoever started it sees that it is over.
  @MainActor
  private static func run(_ job: HeadlessJob) async {
    UIApplication.shared.isIdleTimerDisabled = true
    let status = await Task.detached { () -> Int32 in
      do {
        let findings = try job.run()
        if let trouble = findings.trouble { HeadlessJob.tell("not run: \(trouble.message)") }
        return findings.trouble == nil ? 0 : 1
      } catch {
        HeadlessJob.tell("not run: \(error)")
        return 2
      }
    }.value
    exit(status)
  }
}
