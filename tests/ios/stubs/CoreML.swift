// What the app uses of Core ML. Behind `//=` stands what @nativescript/types-ios calls a name, which a test looks up;
// how Swift renames that, and its overlay behind `//-`, is from Apple's documentation and not checked.

import Foundation

public enum MLComputeUnits {  //= MLComputeUnits
  case all  //= MLComputeUnits.All
}

public enum MLMultiArrayDataType {  //= MLMultiArrayDataType
  case double  //= MLMultiArrayDataType.Double
  case float32  //= MLMultiArrayDataType.Float32
  case float16  //= MLMultiArrayDataType.Float16
  case int32  //= MLMultiArrayDataType.Int32
}

public class MLModelConfiguration: NSObject {  //= MLModelConfiguration
  public var computeUnits = MLComputeUnits.all  //= MLModelConfiguration.computeUnits
  public var functionName: String?  //= MLModelConfiguration.functionName
}

public protocol MLFeatureProvider {  //= MLFeatureProvider
  func featureValue(for featureName: String) -> MLFeatureValue?  //= MLFeatureProvider.featureValueForName
}

public class MLFeatureValue: NSObject {  //= MLFeatureValue
  public init(multiArray value: MLMultiArray) {}  //= MLFeatureValue.featureValueWithMultiArray
  public var multiArrayValue: MLMultiArray? { nil }  //= MLFeatureValue.multiArrayValue
}

public class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {  //= MLDictionaryFeatureProvider
  public init(dictionary: [String: Any]) throws {}  //= MLDictionaryFeatureProvider.initWithDictionaryError
  public func featureValue(for featureName: String) -> MLFeatureValue? { nil }  //= MLFeatureProvider.featureValueForName
}

public class MLMultiArray: NSObject {  //= MLMultiArray
  public init(  //= MLMultiArray.initWithDataPointerShapeDataTypeStridesDeallocatorError
    dataPointer: UnsafeMutableRawPointer, shape: [NSNumber], dataType: MLMultiArrayDataType, strides: [NSNumber],
    deallocator: ((UnsafeMutableRawPointer) -> Void)? = nil
  ) throws {}
  public var shape: [NSNumber] { [] }  //= MLMultiArray.shape
  public var strides: [NSNumber] { [] }  //= MLMultiArray.strides
  public var dataType: MLMultiArrayDataType { .float32 }  //= MLMultiArray.dataType
  public func withUnsafeBytes<R>(  //= MLMultiArray.getBytesWithHandler
    _ body: (UnsafeRawBufferPointer) throws -> R
  ) rethrows -> R { try body(UnsafeRawBufferPointer(start: nil, count: 0)) }
  public func withUnsafeMutableBytes<R>(  //= MLMultiArray.getMutableBytesWithHandler
    _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
  ) rethrows -> R { try body(UnsafeMutableRawBufferPointer(start: nil, count: 0), []) }
}

public class MLState: NSObject {  //= MLState
  public func withMultiArray<R>(  //= MLState.getMultiArrayForStateNamedHandler
    for stateName: String, _ body: (MLMultiArray) throws -> R
  ) rethrows -> R { fatalError() }
}

public class MLModel: NSObject {  //= MLModel
  public class func compileModel(at modelURL: URL) throws -> URL { modelURL }  //= MLModel.compileModelAtURLError
  public init(  //= MLModel.modelWithContentsOfURLConfigurationError
    contentsOf url: URL, configuration: MLModelConfiguration
  ) throws {}
  public func makeState() -> MLState { MLState() }  //= MLModel.newState
  public func prediction(  //= MLModel.predictionFromFeaturesError
    from input: MLFeatureProvider
  ) throws -> MLFeatureProvider { input }
  public func prediction(  //= MLModel.predictionFromFeaturesUsingStateError
    from input: MLFeatureProvider, using state: MLState
  ) throws -> MLFeatureProvider { input }
}
