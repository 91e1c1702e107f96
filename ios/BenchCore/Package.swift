// swift-tools-version:6.0
// What of the iOS app needs nothing of Apple's: it builds and is tested on Linux, too.
import PackageDescription

let package = Package(
  name: "BenchCore",
  platforms: [.iOS(.v18), .macOS(.v15)],
  products: [.library(name: "BenchCore", targets: ["BenchCore"])],
  targets: [
    .target(name: "BenchCore"),
    .testTarget(name: "BenchCoreTests", dependencies: ["BenchCore"]),
  ],
  swiftLanguageModes: [.v5]
)
