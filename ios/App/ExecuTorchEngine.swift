// Graphs of a bundle in ExecuTorch.

import BenchCore
import ExecuTorch
import Foundation

/// Opens ExecuTorch programs; graphs of one file share it, and so the weights.
final class ExecuTorchEngine: Engine {
  private final class Opened {
    weak var module: Module?
  }

  let name = "executorch"
  // The library does not tell its version; the project says which one it is built with.
  let version = Bundle.main.object(forInfoDictionaryKey: "ExecuTorchVersion") as? String ?? "unknown"
  let commit = ""
  private var modules: [String: Opened] = [:]

  // The library's Swift has no way to set them; it takes the fast cores, which it does not tell either.
  func threads(_ wanted: Int) -> Int { ProcessInfo.processInfo.activeProcessorCount }

  func preparation(of graph: GraphInfo, in folder: URL) -> Preparation { .none }

  func open(_ graph: GraphInfo, in folder: URL) throws -> GraphRunner {
    let start = DispatchTime.now()
    let path = folder.appendingPathComponent(graph.file).path
    do {
      let opened = modules[path] ?? Opened()
      modules[path] = opened
      let data = graph.extraFiles.map { folder.appendingPathComponent($0).path }
      let module = opened.module ?? Module(filePath: path, dataFilePaths: data, loadMode: .mmap)
      opened.module = module
      let method = try module.methodNames().contains(graph.stored) ? graph.stored : "forward"
      try module.load(method)
      return ExecuTorchGraph(
        graph, module, method,
        loadMs: Double(DispatchTime.now().uptimeNanoseconds - start.uptimeNanoseconds) / 1e6)
    } catch {
      throw Trouble("ExecuTorch cannot open \(graph.name): \(error.localizedDescription)")
    }
  }
}

private final class ExecuTorchGraph: GraphRunner {
  let info: GraphInfo
  let loadMs: Double
  private let module: Module
  private let method: String

  init(_ info: GraphInfo, _ module: Module, _ method: String, loadMs: Double) {
    self.info = info
    self.module = module
    self.method = method
    self.loadMs = loadMs
  }

  func run(_ inputs: [String: BenchCore.Tensor], states: KeptStates?) throws -> [String: BenchCore.Tensor] {
    let taken = try info.inputs.map { info -> AnyTensor in
      guard let tensor = inputs[info.name], let start = tensor.bytes.baseAddress else {
        throw Trouble("\(self.info.name) was not given \(info.name)")
      }
      return AnyTensor(bytesNoCopy: start, shape: tensor.shape, dataType: type(of: tensor.dtype))
    }
    let given: [Value]
    do {
      // The tensors' memory is used until this returns.
      given = try withExtendedLifetime(inputs) { try module.execute(method, taken) }
    } catch {
      throw Trouble("ExecuTorch failed in \(info.name): \(error.localizedDescription)")
    }
    if given.count != info.outputs.count {
      throw Trouble("\(info.name) gave \(given.count) outputs, not \(info.outputs.count)")
    }
    var outputs: [String: BenchCore.Tensor] = [:]
    for (info, value) in zip(info.outputs, given) {
      guard let found = value.anyTensor, found.dataType == type(of: info.dtype) else {
        throw Trouble("\(self.info.name) gave no \(info.dtype.rawValue) as \(info.name)")
      }
      // Copied: the library's memory is its own again with the next run.
      let tensor = try BenchCore.Tensor(info.dtype, found.shape)
      found.bytes { pointer, count, _ in
        let length = min(count * info.dtype.size, tensor.bytes.count)
        tensor.bytes.copyMemory(from: UnsafeRawBufferPointer(start: pointer, count: length))
      }
      outputs[info.name] = tensor
    }
    return outputs
  }

  func makeStates() throws -> KeptStates {
    throw Trouble("\(info.name) has states, which this app keeps in Core ML alone", missing: true)
  }
}

private func type(of dtype: DType) -> DataType {
  switch dtype {
  case .float32: return .float
  case .float16: return .half
  case .int64: return .long
  case .int32: return .int
  case .int8: return .char
  case .uint8: return .byte
  case .bool: return .bool
  }
}
