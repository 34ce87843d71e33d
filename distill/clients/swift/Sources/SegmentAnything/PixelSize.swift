/// Width and height in pixels.
public struct PixelSize: Equatable, Hashable, Sendable {
    public let width: Int
    public let height: Int

    public init(width: Int, height: Int) {
        self.width = width
        self.height = height
    }

    /// What this becomes with a longest side, as segment-anything rounds it (`ResizeLongestSide`).
    ///
    /// Throws `SegmenterError.elongated` where the short side would have no pixel at all.
    public func fitted(longest: Int) throws -> PixelSize {
        guard width > 0, height > 0 else { throw SegmenterError.elongated(self, longest) }
        let scale = Double(longest) / Double(max(width, height))
        let found = PixelSize(width: Int(Double(width) * scale + 0.5), height: Int(Double(height) * scale + 0.5))
        guard min(found.width, found.height) > 0 else { throw SegmenterError.elongated(self, longest) }
        return found
    }
}
