// Graphs of a bundle in Core ML.

import BenchCore
import CoreML
import Foundation

/// Opens Core ML packages; what it compiles of them is kept in the caches folder, by the manifest that lists them.
final class CoreMLEngine: Engine {
  let name = "coreml"
  // Core ML comes with the system and has its version.
  let version = ProcessInfo.processInfo.operatingSystemVersionString
  let commit = ""

  // Core ML chooses itself; this is what it may choose from.
  func threads(_ wanted: Int) -> Int { ProcessInfo.processInfo.activeProcessorCount }

  func preparation(of graph: GraphInfo, in folder: URL) -> Preparation {
    guard let place = try? compiled(graph, in: folder) else { return .missing }
    return FileManager.default.fileExists(atPath: place.path) ? .there : .missing
  }

  func open(_ graph: GraphInfo, in folder: URL) throws -> GraphRunner {
    let start = DispatchTime.now()
    do {
      let place = try compiled(graph, in: folder)
      if !FileManager.default.fileExists(atPath: place.path) {
        let made = try MLModel.compileModel(at: folder.appendingPathComponent(graph.file))
        try FileManager.default.createDirectory(
          at: place.deletingLastPathComponent(), withIntermediateDirectories: true)
        try FileManager.default.moveItem(at: made, to: place)
      }
      let configuration = MLModelConfiguration()
      configuration.computeUnits = .all
      // A package of one graph has one function, which has a name of its own.
      if graph.sharesFile { configuration.functionName = graph.stored }
      let model = try MLModel(contentsOf: place, configuration: configuration)
      return CoreMLGraph(
        graph, model, loadMs: Double(DispatchTime.now().uptimeNanoseconds - start.uptimeNanoseconds) / 1e6)
    } catch let error as Trouble {
      throw error
    } catch {
      throw Trouble("Core ML cannot open \(graph.name): \(error.localizedDescription)")
    }
  }

  /// Where the compiled package is or will be. A changed bundle has another manifest, and so another place.
  private func compiled(_ graph: GraphInfo, in folder: URL) throws -> URL {
    let manifest = try Data(contentsOf: folder.appendingPathComponent("manifest.json"))
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for byte in manifest { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
    let caches = try FileManager.default.url(
      for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
    let name = graph.file.replacingOccurrences(of: "/", with: "-")
    return caches.appendingPathComponent("compiled/\(String(hash, radix: 16))-\(name).mlmodelc")
  }
}

private final class CoreMLGraph: GraphRunner {
  let info: GraphInfo
  let loadMs: Double
  private let model: MLModel

  init(_ info: GraphInfo, _ model: MLModel, loadMs: Double) {
    self.info = info
    self.model = model
    self.loadMs = loadMs
  }

  func run(_ inputs: [String: Tensor], states: KeptStates?) throws -> [String: Tensor] {
    do {
      var values: [String: MLFeatureValue] = [:]
      for info in info.inputs {
        guard let tensor = inputs[info.name] else { throw Trouble("\(self.info.name) was not given \(info.name)") }
        values[info.name] = MLFeatureValue(multiArray: try array(over: tensor))
      }
      let provider = try MLDictionaryFeatureProvider(dictionary: values)
      let given: MLFeatureProvider
      if let states = states as? CoreMLStates {
        given = try model.prediction(from: provider, using: states.state)
      } else {
        given = try model.prediction(from: provider)
      }
      var outputs: [String: Tensor] = [:]
      for info in info.outputs {
        guard let array = given.featureValue(for: info.name)?.multiArrayValue else {
          throw Trouble("\(self.info.name) did not give \(info.name)")
        }
        outputs[info.name] = try tensor(of: array)
      }
      return outputs
    } catch let error as Trouble {
      throw error
    } catch {
      throw Trouble("Core ML failed in \(info.name): \(error.localizedDescription)")
    }
  }

  func makeStates() throws -> KeptStates { CoreMLStates(model.makeState()) }
}

/// States that functions of one package share.
private final class CoreMLStates: KeptStates {
  let state: MLState

  init(_ state: MLState) { self.state = state }

  func read(_ name: String) throws -> Tensor { try state.withMultiArray(for: name) { try tensor(of: $0) } }

  func write(_ name: String, _ tensor: Tensor) throws {
    try state.withMultiArray(for: name) { array in
      guard array.shape.map(\.intValue) == tensor.shape, try dtype(of: array) == tensor.dtype else {
        throw Trouble("the state \(name) is \(array.shape), not \(tensor.dtype.rawValue) \(tensor.shape)")
      }
      try array.withUnsafeMutableBytes { try tensor.copy(to: $0, strides: $1) }
    }
  }
}

/// An array in the tensor's own memory.
private func array(over tensor: Tensor) throws -> MLMultiArray {
  let types: [DType: MLMultiArrayDataType] = [.float32: .float32, .float16: .float16, .int32: .int32]
  guard let type = types[tensor.dtype], let start = tensor.bytes.baseAddress else {
    throw Trouble("Core ML takes no \(tensor.dtype.rawValue)", missing: true)
  }
  let strides = tensor.shape.indices.map { tensor.shape[($0 + 1)...].reduce(1, *) }
  return try MLMultiArray(
    dataPointer: start, shape: tensor.shape.map { NSNumber(value: $0) }, dataType: type,
    strides: strides.map { NSNumber(value: $0) },
    // Holds the tensor until Core ML lets go of it.
    deallocator: { _ in withExtendedLifetime(tensor) {} })
}

private func dtype(of array: MLMultiArray) throws -> DType {
  switch array.dataType {
  case .float32: return .float32
  case .float16: return .float16
  case .int32: return .int32
  default: throw Trouble("Core ML gave numbers of a kind that is not exchanged", missing: true)
  }
}

/// A copy; Core ML's rows may lie further apart than they are long.
private func tensor(of array: MLMultiArray) throws -> Tensor {
  let dtype = try dtype(of: array)
  let strides = array.strides.map(\.intValue)
  return try array.withUnsafeBytes { try Tensor(dtype, array.shape.map(\.intValue), from: $0, strides: strides) }
}
