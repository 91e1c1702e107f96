// What the app uses of SwiftUI. It is Swift alone and has no Objective-C names that could be looked up: this is from
// Apple's documentation and checked by nothing. It proves that the app's own code fits together, not that it fits SwiftUI.

import Foundation
@_exported import Observation
@_exported import UIKit

@MainActor @preconcurrency
public protocol View {
  associatedtype Body: View
  @ViewBuilder var body: Body { get }
}

extension Never: View {
  public var body: Never { return fatalError() }
}

@resultBuilder
public enum ViewBuilder {
  public static func buildBlock<each Part: View>(_ part: repeat each Part) -> Group<(repeat each Part)> { Group() }
  public static func buildIf<Part: View>(_ part: Part?) -> Group<Part?> { Group() }
  public static func buildEither<One: View, Other: View>(first: One) -> Group<(One, Other)> { Group() }
  public static func buildEither<One: View, Other: View>(second: Other) -> Group<(One, Other)> { Group() }
}

public struct Group<Content>: View {
  nonisolated init() {}
  public var body: Never { return fatalError() }
}

@MainActor @preconcurrency
public protocol Scene {}

@MainActor @preconcurrency
public protocol App {
  associatedtype Content: Scene
  init()
  var body: Content { get }
}

extension App {
  public static func main() {}
}

public struct WindowGroup<Content: View>: Scene {
  public init(@ViewBuilder content: () -> Content) {}
}

@propertyWrapper
public struct State<Value> {
  public init(wrappedValue: Value) { self.wrappedValue = wrappedValue }
  public init() where Value: ExpressibleByNilLiteral { wrappedValue = nil }
  public var wrappedValue: Value {
    get { fatalError() }
    nonmutating set {}
  }
  public var projectedValue: Binding<Value> { Binding() }
}

public struct Binding<Value> {}

public struct Text: View {
  public init<S: StringProtocol>(_ content: S) {}
  public var body: Never { return fatalError() }
}

public struct VStack<Content: View>: View {
  public init(alignment: HorizontalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> Content) {}
  public var body: Never { return fatalError() }
}

public struct HStack<Content: View>: View {
  public init(spacing: CGFloat? = nil, @ViewBuilder content: () -> Content) {}
  public var body: Never { return fatalError() }
}

public enum HorizontalAlignment {
  case leading, center
}

public struct ScrollView<Content: View>: View {
  public init(@ViewBuilder content: () -> Content) {}
  public var body: Never { return fatalError() }
}

public struct Picker<Selection: Hashable, Content: View>: View {
  public init<S: StringProtocol>(_ title: S, selection: Binding<Selection>, @ViewBuilder content: () -> Content) {}
  public var body: Never { return fatalError() }
}

public struct ForEach<Data: RandomAccessCollection, ID: Hashable, Content: View>: View {
  public init(_ data: Data, id: KeyPath<Data.Element, ID>, @ViewBuilder content: (Data.Element) -> Content) {}
  public var body: Never { return fatalError() }
}

public struct Button: View {
  public init<S: StringProtocol>(_ title: S, action: @escaping @MainActor () -> Void) {}
  public var body: Never { return fatalError() }
}

public struct TextField: View {
  public init<S: StringProtocol>(_ title: S, text: Binding<String>) {}
  public var body: Never { return fatalError() }
}

public struct ProgressView: View {
  public init() {}
  public var body: Never { return fatalError() }
}

public struct Image: View {
  public init(uiImage: UIImage) {}
  public func resizable() -> Image { self }
  public var body: Never { return fatalError() }
}

public enum ContentMode {
  case fit
}

public struct Color: Sendable {
  public static let black = Color()
  public static let red = Color()
  public func opacity(_ opacity: Double) -> Color { self }
}

public struct Path {
  public init(_ rect: CGRect) {}
}

public struct GraphicsContext {
  public struct Shading {
    public static func color(_ color: Color) -> Shading { Shading() }
  }
  public func fill(_ path: Path, with shading: Shading) {}
}

public struct Canvas: View {
  public init(renderer: @escaping (inout GraphicsContext, CGSize) -> Void) {}
  public var body: Never { return fatalError() }
}

extension View {
  public func task(_ action: @escaping @Sendable () async -> Void) -> some View { Group<Self>() }
  public func padding() -> some View { Group<Self>() }
  public func disabled(_ disabled: Bool) -> some View { Group<Self>() }
  public func tag<V: Hashable>(_ tag: V) -> some View { Group<Self>() }
  public func foregroundStyle(_ color: Color) -> some View { Group<Self>() }
  public func aspectRatio(_ ratio: CGFloat? = nil, contentMode: ContentMode) -> some View { Group<Self>() }
  public func overlay<V: View>(@ViewBuilder content: () -> V) -> some View { Group<Self>() }
  public func onChange<V: Equatable>(of value: V, initial: Bool = false, _ action: @escaping () -> Void) -> some View {
    Group<Self>()
  }
  public func sheet<V: View>(isPresented: Binding<Bool>, @ViewBuilder content: @escaping () -> V) -> some View {
    Group<Self>()
  }
}

public struct UIViewControllerRepresentableContext<Representable: UIViewControllerRepresentable> {
  public var coordinator: Representable.Coordinator { fatalError() }
}

@MainActor @preconcurrency
public protocol UIViewControllerRepresentable: View where Body == Never {
  associatedtype UIViewControllerType: UIViewController
  associatedtype Coordinator
  typealias Context = UIViewControllerRepresentableContext<Self>
  func makeUIViewController(context: Context) -> UIViewControllerType
  func updateUIViewController(_ controller: UIViewControllerType, context: Context)
  func makeCoordinator() -> Coordinator
}

extension UIViewControllerRepresentable {
  public var body: Never { return fatalError() }
}
