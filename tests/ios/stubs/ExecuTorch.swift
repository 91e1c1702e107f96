// What the app uses of ExecuTorch's Swift. Checked by eye against extension/apple/ExecuTorch/Exported of its repository
// (ExecuTorch+Tensor.swift, ExecuTorch+Value.swift, ExecuTorch+Module.swift and the headers), as of 2026; by no test.

import Foundation

public enum DataType: Int8 {
  case byte, char, short, int, long, half, float, double, bool
}

public enum ModuleLoadMode {
  case file, mmap
}

public protocol ValueConvertible {
  func asValue() -> Value
}

public class Value: NSObject, ValueConvertible {
  public func asValue() -> Value { self }
  public var anyTensor: AnyTensor? { nil }
}

// The app must say which module it means.
public final class Tensor<T> {}

public class AnyTensor: NSObject, ValueConvertible {
  public convenience init(
    bytesNoCopy pointer: UnsafeMutableRawPointer, shape: [Int], strides: [Int] = [], dimensionOrder: [Int] = [],
    dataType: DataType
  ) { self.init() }
  public func asValue() -> Value { Value() }
  public var dataType: DataType { .float }
  public var shape: [Int] { [] }
  public func bytes(_ handler: (UnsafeRawPointer, Int, DataType) -> Void) {}
}

public class Module: NSObject {
  public init(filePath: String, dataFilePaths: [String], loadMode: ModuleLoadMode) {}
  public func load(_ method: String) throws {}
  public func methodNames() throws -> Set<String> { [] }
  public func execute(_ method: String, _ inputs: [ValueConvertible]) throws -> [Value] { [] }
}
