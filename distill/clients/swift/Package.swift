// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "SegmentAnything",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [
        .library(name: "SegmentAnything", targets: ["SegmentAnything"]),
        .executable(name: "segment", targets: ["segment"]),
    ],
    targets: [
        // Without optimisation a photograph of 12 megapixels takes seconds to resize, in an app that is debugged too. SwiftPM
        // refuses such flags in a dependency that is named by version: leave them out there.
        .target(
            name: "SegmentAnything", swiftSettings: [.unsafeFlags(["-O"], .when(configuration: .debug))]),
        .executableTarget(name: "segment", dependencies: ["SegmentAnything"]),
        .testTarget(name: "SegmentAnythingTests", dependencies: ["SegmentAnything"], exclude: ["Example"]),
    ]
)
