// What the app uses of UIKit, of Core Graphics, which UIKit hands on, and of the part of Foundation that Linux lacks.
// Behind `//=` stands what @nativescript/types-ios calls a name, which a test looks up; how Swift renames that, and what
// has no such name, behind `//-`, is from Apple's documentation and not checked.

import Foundation

// Foundation

extension ProcessInfo {  //= NSProcessInfo
  public enum ThermalState {  //= NSProcessInfoThermalState
    case nominal  //= NSProcessInfoThermalState.Nominal
    case fair  //= NSProcessInfoThermalState.Fair
    case serious  //= NSProcessInfoThermalState.Serious
    case critical  //= NSProcessInfoThermalState.Critical
  }
  public var thermalState: ThermalState { .nominal }  //= NSProcessInfo.thermalState
  public var isLowPowerModeEnabled: Bool { false }  //= NSProcessInfo.lowPowerModeEnabled
}

// Core Graphics

public class CGImage {  //- a type of Core Foundation
  public var width: Int { 0 }  //= CGImageGetWidth
  public var height: Int { 0 }  //= CGImageGetHeight
}

public class CGColorSpace {}  //- a type of Core Foundation

public func CGColorSpaceCreateDeviceRGB() -> CGColorSpace { CGColorSpace() }  //= CGColorSpaceCreateDeviceRGB

public enum CGImageAlphaInfo: UInt32 {  //= CGImageAlphaInfo
  case noneSkipLast = 5  //= CGImageAlphaInfo.kCGImageAlphaNoneSkipLast
}

public class CGContext {  //- a type of Core Foundation
  public init?(  //= CGBitmapContextCreate
    data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int, bytesPerRow: Int,
    space: CGColorSpace, bitmapInfo: UInt32
  ) {}
  public func draw(_ image: CGImage, in rect: CGRect) {}  //= CGContextDrawImage
}

// UIKit

@MainActor
public class UIDevice: NSObject {  //= UIDevice
  public class var current: UIDevice { UIDevice() }  //= UIDevice.currentDevice
  public enum BatteryState: Sendable {  //= UIDeviceBatteryState
    case unknown  //= UIDeviceBatteryState.Unknown
    case unplugged  //= UIDeviceBatteryState.Unplugged
    case charging  //= UIDeviceBatteryState.Charging
    case full  //= UIDeviceBatteryState.Full
  }
  public var systemName: String { "" }  //= UIDevice.systemName
  public var systemVersion: String { "" }  //= UIDevice.systemVersion
  public var isBatteryMonitoringEnabled = false  //= UIDevice.batteryMonitoringEnabled
  public var batteryLevel: Float { 0 }  //= UIDevice.batteryLevel
  public var batteryState: BatteryState { .unknown }  //= UIDevice.batteryState
}

@MainActor
public class UIApplication: NSObject {  //= UIApplication
  public class var shared: UIApplication { UIApplication() }  //= UIApplication.sharedApplication
  public var isIdleTimerDisabled = false  //= UIApplication.idleTimerDisabled
}

public class UIColor: NSObject {  //= UIColor
  public class var white: UIColor { UIColor() }  //= UIColor.whiteColor
  public func setFill() {}  //= UIColor.setFill
}

public class UIImage: NSObject, @unchecked Sendable {  //= UIImage
  public init?(data: Data) {}  //= UIImage.initWithData
  public var size: CGSize { .zero }  //= UIImage.size
  public var scale: CGFloat { 1 }  //= UIImage.scale
  public var cgImage: CGImage? { nil }  //= UIImage.CGImage
  public func draw(in rect: CGRect) {}  //= UIImage.drawInRect
}

public class UIGraphicsImageRendererFormat: NSObject {  //= UIGraphicsImageRendererFormat
  public var scale: CGFloat = 1  //= UIGraphicsImageRendererFormat.scale
  public var opaque = false  //= UIGraphicsImageRendererFormat.opaque
}

public class UIGraphicsImageRendererContext: NSObject {  //= UIGraphicsImageRendererContext
  public func fill(_ rect: CGRect) {}  //= UIGraphicsRendererContext.fillRect
}

public class UIGraphicsImageRenderer: NSObject {  //= UIGraphicsImageRenderer
  public init(size: CGSize, format: UIGraphicsImageRendererFormat) {}  //= UIGraphicsImageRenderer.initWithSizeFormat
  public func image(  //= UIGraphicsImageRenderer.imageWithActions
    actions: (UIGraphicsImageRendererContext) -> Void
  ) -> UIImage { fatalError() }
}

@MainActor
public class UIViewController: NSObject {  //= UIViewController
  public override nonisolated init() {}  //= UIViewController
  public func dismiss(  //= UIViewController.dismissViewControllerAnimatedCompletion
    animated flag: Bool, completion: (() -> Void)? = nil
  ) {}
}

@MainActor
public protocol UINavigationControllerDelegate {}  //= UINavigationControllerDelegate

@MainActor
public protocol UIImagePickerControllerDelegate {  //= UIImagePickerControllerDelegate
  func imagePickerController(  //= UIImagePickerControllerDelegate.imagePickerControllerDidFinishPickingMediaWithInfo
    _ picker: UIImagePickerController, didFinishPickingMediaWithInfo info: [UIImagePickerController.InfoKey: Any])
  func imagePickerControllerDidCancel(  //= UIImagePickerControllerDelegate.imagePickerControllerDidCancel
    _ picker: UIImagePickerController)
}

@MainActor
public class UIImagePickerController: UIViewController {  //= UIImagePickerController
  public enum SourceType {  //= UIImagePickerControllerSourceType
    case photoLibrary  //= UIImagePickerControllerSourceType.PhotoLibrary
    case camera  //= UIImagePickerControllerSourceType.Camera
  }
  public struct InfoKey: Hashable, Sendable {  //- a string in Objective-C
    public static let originalImage = InfoKey()  //= UIImagePickerControllerOriginalImage
  }
  public class func isSourceTypeAvailable(  //= UIImagePickerController.isSourceTypeAvailable
    _ sourceType: SourceType
  ) -> Bool { false }
  public var sourceType = SourceType.photoLibrary  //= UIImagePickerController.sourceType
  public weak var delegate: AnyObject?  //= UIImagePickerController.delegate
}
