// The phone as its system tells: what it is, how hot, how charged, how much memory this app takes.

import BenchCore
import Darwin
import Foundation
import UIKit
import os

/// The phone that this app runs on; it has no thermometer that apps may read.
final class Phone: Device {
  init() { onMain { UIDevice.current.isBatteryMonitoringEnabled = true } }

  var info: Findings.Device {
    #if targetEnvironment(simulator)
      let kind = Findings.Device.Kind.simulator
    #else
      let kind = Findings.Device.Kind.phone
    #endif
    let process = ProcessInfo.processInfo
    let system = onMain { "\(UIDevice.current.systemName) \(UIDevice.current.systemVersion)" }
    return Findings.Device(
      name: "Apple \(model)", kind: kind, os: system, abi: "arm64", soc: "", cores: process.activeProcessorCount,
      ramBytes: Int(clamping: process.physicalMemory))
  }

  /// The kind of device, such as `iPhone16,1`.
  private var model: String {
    var system = utsname()
    uname(&system)
    return withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
  }

  func condition() -> Findings.Condition {
    let (level, state) = onMain { (UIDevice.current.batteryLevel, UIDevice.current.batteryState) }
    return Findings.Condition(
      thermal: thermal, celsius: nil,
      // Below zero where it is not known, as in the simulator.
      battery: level < 0 ? nil : Double(min(level, 1)),
      charging: state == .unknown ? nil : state == .charging || state == .full,
      lowPower: ProcessInfo.processInfo.isLowPowerModeEnabled)
  }

  private var thermal: String {
    switch ProcessInfo.processInfo.thermalState {
    case .nominal: return "nominal"
    case .fair: return "fair"
    case .serious: return "serious"
    case .critical: return "critical"
    @unknown default: return "unknown"
    }
  }

  var isThrottled: Bool { ProcessInfo.processInfo.thermalState != .nominal }

  // What the system kills an app for, rather than what is resident: weights in mapped files do not count.
  var peakBytes: Int { memory.map { Int(clamping: $0.ledger_phys_footprint_peak) } ?? 0 }
  var bytes: Int { memory.map { Int(clamping: $0.phys_footprint) } ?? 0 }
  var availableBytes: Int { Int(clamping: os_proc_available_memory()) }

  private var memory: task_vm_info_data_t? {
    var info = task_vm_info_data_t()
    var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size)
    let status = withUnsafeMutablePointer(to: &info) {
      $0.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
        task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
      }
    }
    return status == KERN_SUCCESS ? info : nil
  }
}

/// Asks something that only the main thread may ask.
private func onMain<Made: Sendable>(_ ask: @MainActor @Sendable () -> Made) -> Made {
  if Thread.isMainThread { return MainActor.assumeIsolated { ask() } }
  return DispatchQueue.main.sync { MainActor.assumeIsolated { ask() } }
}
