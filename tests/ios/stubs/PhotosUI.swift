// What the app uses of PhotosUI's Swift, which is from Apple's documentation and checked by nothing.

import Foundation
import SwiftUI

public struct PhotosPickerItem: Equatable, Sendable {
  public func loadTransferable<T: Sendable>(type: T.Type) async throws -> T? { nil }
}

public struct PHPickerFilter {
  public static var images: PHPickerFilter { PHPickerFilter() }
}

public struct PhotosPicker: View {
  public init<S: StringProtocol>(_ title: S, selection: Binding<PhotosPickerItem?>, matching filter: PHPickerFilter?) {}
  public var body: Never { return fatalError() }
}
