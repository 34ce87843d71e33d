#if canImport(CoreML)
import CoreML
import Foundation

/// Packages, compiled once for each content and version of the system.
enum ModelStore {
    /// A model that can run. What cannot be loaded from the caches directory any more is compiled again.
    static func load(_ url: URL, _ configuration: MLModelConfiguration) async throws -> MLModel {
        if url.pathExtension == "mlmodelc" { return try await MLModel.load(contentsOf: url, configuration: configuration) }
        let place = try self.place(of: url)
        if FileManager.default.fileExists(atPath: place.path) {
            if let kept = try? await MLModel.load(contentsOf: place, configuration: configuration) { return kept }
            try? FileManager.default.removeItem(at: place)
        }
        try await compile(url, to: place)
        return try await MLModel.load(contentsOf: place, configuration: configuration)
    }

    private static func place(of package: URL) throws -> URL {
        let caches = try FileManager.default.url(
            for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let system = ProcessInfo.processInfo.operatingSystemVersion
        let version = "\(system.majorVersion).\(system.minorVersion).\(system.patchVersion)"
        let name = package.deletingPathExtension().lastPathComponent
        return caches.appendingPathComponent("SegmentAnything", isDirectory: true)
            .appendingPathComponent("\(name)-\(try Packages.key(of: package))-\(version).mlmodelc", isDirectory: true)
    }

    private static func compile(_ package: URL, to place: URL) async throws {
        let made = try await MLModel.compileModel(at: package)
        let manager = FileManager.default
        try manager.createDirectory(at: place.deletingLastPathComponent(), withIntermediateDirectories: true)
        do {
            try manager.moveItem(at: made, to: place)
        } catch {
            guard manager.fileExists(atPath: place.path) else { throw error }
            try? manager.removeItem(at: made)  // another process was faster
        }
    }
}
#endif
