import Foundation

/// Clicks and a box on a picture, in its pixels, and how the decoder is asked for what they mean.
public struct Prompt: Sendable {
    public let points: [CGPoint]
    /// 1 for each point on the object, 0 off it.
    public let labels: [Int]
    public let box: CGRect?

    /// - Parameters:
    ///   - labels: default: all points are on the object.
    ///
    /// Throws where labels do not fit the points, or a coordinate is no number. Points beside the picture are taken as
    /// they are.
    public init(points: [CGPoint] = [], labels: [Int]? = nil, box: CGRect? = nil) throws {
        self.points = points
        self.labels = labels ?? [Int](repeating: 1, count: points.count)
        self.box = box
        guard self.labels.count == points.count, self.labels.allSatisfy({ $0 == 0 || $0 == 1 }) else {
            throw SegmenterError.labels(self.labels, points: points.count)
        }
        guard (points + corners).allSatisfy({ $0.x.isFinite && $0.y.isFinite }) else { throw SegmenterError.notFinite }
    }

    public var isEmpty: Bool { points.isEmpty && box == nil }

    private var corners: [CGPoint] {
        box.map { [CGPoint(x: $0.minX, y: $0.minY), CGPoint(x: $0.maxX, y: $0.maxY)] } ?? []
    }

    /// Coordinates (x, y, x, y, …) and labels as the decoder takes them: in pixels of the picture at a longest side, label
    /// −1 in every place where there is no point. The point that ends a prompt without a box is added by the decoder.
    ///
    /// - Parameters:
    ///   - room: places that the decoder has.
    ///   - longest: side of the images that prompts are meant for; the encoder may take smaller ones.
    public func slots(room: Int, picture: PixelSize, longest: Int) throws -> (coords: [Float], labels: [Float]) {
        let given = points + corners
        guard given.count <= room else {
            throw SegmenterError.tooManyPoints(points.count, room: room - corners.count)
        }
        let resized = try picture.fitted(longest: longest)
        let across = Double(resized.width) / Double(picture.width)
        let down = Double(resized.height) / Double(picture.height)
        var coords = [Float](repeating: 0, count: 2 * room)
        var kinds = [Float](repeating: -1, count: room)
        for (place, point) in given.enumerated() {
            coords[2 * place] = Float(Double(point.x) * across)
            coords[2 * place + 1] = Float(Double(point.y) * down)
            kinds[place] = place < points.count ? Float(labels[place]) : Float(2 + place - points.count)
        }
        return (coords, kinds)
    }

    /// Which of the four masks `SamPredictor` is asked for: one click may mean a part or the whole, and of the three masks
    /// for that the one that the decoder believes in most is taken; anything more is clear, and the first mask is for that.
    public func choose(_ predictedIoUs: [Float]) -> Int {
        if points.count + corners.count != 1 { return 0 }
        var best = 1
        for mask in predictedIoUs.indices.dropFirst(2) where predictedIoUs[mask] > predictedIoUs[best] { best = mask }
        return best
    }
}
