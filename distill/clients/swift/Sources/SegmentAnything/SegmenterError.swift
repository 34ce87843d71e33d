import Foundation

/// What cannot be done, in one line.
public enum SegmenterError: Error, Equatable {
    /// A picture whose short side would have no pixel at this longest side, or that has none.
    case elongated(PixelSize, Int)
    /// Neither point nor box nor an earlier mask.
    case emptyPrompt
    /// More points than the decoder has room for.
    case tooManyPoints(Int, room: Int)
    /// As many labels as points are needed, each 1 (on the object) or 0 (off it).
    case labels([Int], points: Int)
    /// A coordinate of a point or box is NaN or infinite.
    case notFinite
    /// A size to answer at has no pixels.
    case noPixels(PixelSize)
    /// An earlier mask is of a model of another size.
    case otherModel(String)
    /// A picture cannot be read or drawn.
    case unreadable(String)
    /// A model is missing, or is not of this kind.
    case model(String)
}

extension SegmenterError: LocalizedError, CustomStringConvertible {
    public var errorDescription: String? { description }

    public var description: String {
        switch self {
        case .elongated(let size, let longest):
            return "\(size.width)×\(size.height) px cannot be resized to a longest side of \(longest) px"
        case .emptyPrompt: return "a prompt needs a point, a box, or an earlier mask"
        case .tooManyPoints(let count, let room): return "\(count) points are more than \(room)"
        case .labels(let labels, let points): return "labels \(labels) are not a 1 or 0 for each of \(points) points"
        case .notFinite: return "a coordinate is not a finite number"
        case .noPixels(let size): return "a mask of \(size.width)×\(size.height) px has no pixels"
        case .otherModel(let what), .unreadable(let what), .model(let what): return what
        }
    }
}
