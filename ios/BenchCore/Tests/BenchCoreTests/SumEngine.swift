// An engine for tests: its graphs give whole numbers below 97 that depend on every input and its place.

import Foundation

@testable import BenchCore

/// One call of a graph: its name, the sum over all it was given, the shapes of its inputs.
struct Call: Equatable {
  let graph: String
  let sum: Int
  let shapes: [[Int]]
}

/// What graphs were run, in order.
final class Calls {
  var all: [Call] = []
}

/// The graph that tests/phones/make_vectors.py defines; with states as tests/ios/fake_bundle.py does.
///
/// A state is summed up like an input behind the inputs; then element k of state m (from 1) becomes
/// (s + 17 * m + 3 * k) % 97.
final class SumGraph: GraphRunner {
  let info: GraphInfo
  let loadMs = 0.25
  private let calls: Calls

  init(_ info: GraphInfo, _ calls: Calls) {
    self.info = info
    self.calls = calls
  }

  func run(_ inputs: [String: Tensor], states: KeptStates?) throws -> [String: Tensor] {
    var sum = 0
    var shapes: [[Int]] = []
    for (number, taken) in (info.inputs + info.states).enumerated() {
      let found = number < info.inputs.count ? inputs[taken.name] : try states?.read(taken.name)
      guard let tensor = found else { throw Trouble("\(info.name) lacks \(taken.name)") }
      let weighted = try tensor.wholes().enumerated().reduce(0) { $0 + $1.element * (1 + $1.offset % 7) }
      sum += (number + 1) * weighted
      if number < info.inputs.count { shapes.append(tensor.shape) }
    }
    calls.all.append(Call(graph: info.name, sum: sum, shapes: shapes))
    for (number, state) in info.states.enumerated() {
      let values = (0..<(try Tensor.count(state.shape))).map { Self.modulo(sum + 17 * (number + 1) + 3 * $0) }
      try states?.write(state.name, Self.tensor(state.dtype, state.shape, values))
    }
    var given: [String: Tensor] = [:]
    for (number, made) in info.outputs.enumerated() {
      let shape = made.shape.indices.map { made.dynamic.contains($0) ? shapes[0][1] : made.shape[$0] }
      let values = (0..<(try Tensor.count(shape))).map { Self.modulo(sum + 31 * (number + 1) + 7 * $0) }
      given[made.name] = try Self.tensor(made.dtype, shape, values)
    }
    return given
  }

  func makeStates() throws -> KeptStates { try SumStates(info.states) }

  private static func modulo(_ number: Int) -> Int { (number % 97 + 97) % 97 }

  private static func tensor(_ dtype: DType, _ shape: [Int], _ values: [Int]) throws -> Tensor {
    dtype == .float32
      ? try Tensor(shape, floats: values.map { Float($0) }) : try Tensor(dtype, shape, wholes: values)
  }
}

final class SumStates: KeptStates {
  private var tensors: [String: Tensor] = [:]

  init(_ infos: [TensorInfo]) throws {
    for info in infos { tensors[info.name] = try Tensor(info.dtype, info.shape) }
  }

  func read(_ name: String) throws -> Tensor {
    guard let tensor = tensors[name] else { throw Trouble("there is no state \(name)") }
    let copy = try Tensor(tensor.dtype, tensor.shape)
    copy.bytes.copyMemory(from: UnsafeRawBufferPointer(tensor.bytes))
    return copy
  }

  func write(_ name: String, _ tensor: Tensor) throws { tensors[name] = tensor }
}

final class SumEngine: Engine {
  let name: String
  let version = "1"
  let commit = ""
  let calls = Calls()
  private var prepared: Set<String> = []

  init(_ name: String) { self.name = name }

  func threads(_ wanted: Int) -> Int { max(wanted, 1) }

  func preparation(of graph: GraphInfo, in folder: URL) -> Preparation {
    prepared.contains(folder.path + graph.name) ? .there : .missing
  }

  func open(_ graph: GraphInfo, in folder: URL) throws -> GraphRunner {
    prepared.insert(folder.path + graph.name)
    return SumGraph(graph, calls)
  }
}

/// A computer that is as hot as it is told to be.
final class TestDevice: Device {
  var celsius: Double?
  var isThrottled = false
  let peakBytes = 2_000_000
  let bytes = 1_000_000
  let availableBytes = 3_000_000

  var info: Findings.Device {
    Findings.Device(
      name: "a test", kind: .desktop, os: "Linux", abi: "x86_64", soc: "", cores: 2, ramBytes: 1 << 30)
  }

  func condition() -> Findings.Condition {
    Findings.Condition(thermal: "nominal", celsius: celsius, battery: 0.5, charging: false, lowPower: false)
  }
}
