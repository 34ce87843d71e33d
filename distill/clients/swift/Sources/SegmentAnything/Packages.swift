import Foundation

/// Encoder and decoder of a folder, and what tells one package from another.
public enum Packages {
    /// The encoder and decoder in a folder: packages (`.mlpackage`) or compiled models (`.mlmodelc`) whose names have
    /// `Encoder` and `Decoder` in them; of several the shortest name, which is the one that is not compressed.
    ///
    /// Throws where one is missing.
    public static func pair(in folder: URL) throws -> (encoder: URL, decoder: URL) {
        let found = try FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
            .filter { ["mlpackage", "mlmodelc"].contains($0.pathExtension) }
            .sorted {
                let (one, other) = ($0.lastPathComponent, $1.lastPathComponent)
                return (one.count, one) < (other.count, other)
            }
        func first(_ kind: String) throws -> URL {
            guard let url = found.first(where: { $0.lastPathComponent.contains(kind) }) else {
                throw SegmenterError.model("there is no …\(kind).mlpackage in \(folder.path)")
            }
            return url
        }
        return (try first("Encoder"), try first("Decoder"))
    }

    /// Sixteen digits that change when a file of a package does: its path within, size and date (FNV-1a, 64 bits).
    static func key(of package: URL) throws -> String {
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        let manager = FileManager.default
        guard let paths = manager.enumerator(atPath: package.path)?.allObjects as? [String], !paths.isEmpty else {
            throw SegmenterError.model("\(package.path) is no package")
        }
        for path in paths.sorted() {
            let about = try manager.attributesOfItem(atPath: package.appendingPathComponent(path).path)
            let date = (about[.modificationDate] as? Date)?.timeIntervalSince1970 ?? 0
            let size = (about[.size] as? NSNumber)?.int64Value ?? 0
            for byte in "\(path)\n\(size)\n\(date)\n".utf8 {
                hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3
            }
        }
        let digits = String(hash, radix: 16)
        return String(repeating: "0", count: 16 - digits.count) + digits
    }
}
