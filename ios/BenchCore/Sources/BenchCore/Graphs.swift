// What the walk needs of an engine: graphs that run, and states that it keeps between their runs.

import Foundation

/// One open graph of a bundle, in whatever engine.
public protocol GraphRunner: AnyObject {
  var info: GraphInfo { get }
  /// How long it took to open.
  var loadMs: Double { get }

  /// Runs it once, named tensors in and out. What it gives may lie in the engine's memory until it runs again.
  ///
  /// `states` are those that the graph reads and writes; nil for a graph that has none. Throws Trouble.
  func run(_ inputs: [String: Tensor], states: KeptStates?) throws -> [String: Tensor]

  /// States of their own for one cache, all zeros; graphs of one file take them in turns. Throws Trouble.
  func makeStates() throws -> KeptStates
}

/// Buffers that an engine keeps between runs, and that graphs write.
public protocol KeptStates: AnyObject {
  /// A copy. Throws Trouble.
  func read(_ name: String) throws -> Tensor
  /// Replaces a whole buffer. Throws Trouble.
  func write(_ name: String, _ tensor: Tensor) throws
}

/// Files that an engine makes when it opens a graph for the first time on a device.
public enum Preparation {
  /// It makes none: every opening is like the first.
  case none
  case missing
  case there
}

/// What opens graphs.
public protocol Engine: AnyObject {
  /// The word for it in a manifest: `coreml`, `executorch`.
  var name: String { get }
  var version: String { get }
  var commit: String { get }
  /// How many threads are in force once so many are wanted, 0 being its own choice.
  func threads(_ wanted: Int) -> Int
  /// How far the files are that make later openings faster than the first one on this device.
  func preparation(of graph: GraphInfo, in folder: URL) -> Preparation
  /// Throws Trouble.
  func open(_ graph: GraphInfo, in folder: URL) throws -> GraphRunner
}

/// All graphs of a bundle, open.
public final class Graphs {
  public let manifest: Manifest
  private let runners: [String: GraphRunner]

  /// Throws Trouble; `missing` where there is no engine for a graph.
  public init(_ manifest: Manifest, in folder: URL, engines: [Engine]) throws {
    try manifest.checkFiles(in: folder)
    self.manifest = manifest
    runners = try Dictionary(
      uniqueKeysWithValues: manifest.graphs.map { ($0.name, try engine(for: $0, among: engines).open($0, in: folder)) })
  }

  /// Throws Trouble where graphs and manifest do not belong together.
  public init(_ manifest: Manifest, runners: [GraphRunner]) {
    self.manifest = manifest
    self.runners = Dictionary(runners.map { ($0.info.name, $0) }, uniquingKeysWith: { $1 })
  }

  public func has(_ name: String) -> Bool { runners[name] != nil }

  /// Throws Trouble.
  public subscript(_ name: String) -> GraphRunner {
    get throws {
      guard let runner = runners[name] else {
        throw Trouble("\(manifest.name) has no \(name); export it whole, without --only")
      }
      return runner
    }
  }

  /// Runs a graph once it was made sure that it gets what it takes, and gives what it says. Throws Trouble.
  public func run(_ name: String, _ inputs: [String: Tensor], states: KeptStates? = nil) throws -> [String: Tensor] {
    let runner = try self[name]
    for info in runner.info.inputs {
      guard let tensor = inputs[info.name] else { throw Trouble("\(name) was not given \(info.name)") }
      try info.check(tensor, of: name)
    }
    if !runner.info.states.isEmpty && states == nil { throw Trouble("\(name) was given no states") }
    let given = try runner.run(inputs, states: runner.info.states.isEmpty ? nil : states)
    for info in runner.info.outputs {
      guard let tensor = given[info.name] else { throw Trouble("\(name) did not give \(info.name)") }
      try info.check(tensor, of: name)
    }
    return given
  }
}

func engine(for graph: GraphInfo, among engines: [Engine]) throws -> Engine {
  guard let engine = engines.first(where: { $0.name == graph.engine }) else {
    throw Trouble("\(graph.name) is for \(graph.engine), which this app does not have", missing: true)
  }
  return engine
}
