import Foundation

/// What belongs to an object.
public struct Mask: Sendable {
    public let size: PixelSize
    /// A byte a pixel, row by row from the top: 255 on the object, else 0.
    public let bytes: [UInt8]
    /// The decoder's own estimate of how much of the mask is right.
    public let predictedIoU: Float
    /// Of the low-resolution mask, which a further prompt takes as `previous`.
    public let logits: Logits
    /// Pixels of the object.
    public let area: Int
    /// The smallest rectangle that holds the object, whole pixels; nil where there is none.
    public let boundingBox: CGRect?

    /// - Parameters:
    ///   - logits: of the model, for images of 4 × their side.
    ///   - picture: the size of the picture that was prompted.
    ///   - size: that the mask is wanted at.
    public init(logits: Logits, predictedIoU: Float, picture: PixelSize, at size: PixelSize) throws {
        self.size = size
        self.predictedIoU = predictedIoU
        self.logits = logits
        bytes = try Enlarging(cells: logits.side, picture: picture, size: size).mask(logits)
        (area, boundingBox) = Self.extent(bytes, size)
    }

    /// Whether a pixel, counted from the top left, is on the object.
    public func contains(x: Int, y: Int) -> Bool {
        (0..<size.width).contains(x) && (0..<size.height).contains(y) && bytes[y * size.width + x] > 0
    }

    private static func extent(_ bytes: [UInt8], _ size: PixelSize) -> (Int, CGRect?) {
        var (area, left, right, top, bottom) = (0, size.width, -1, size.height, -1)
        bytes.withUnsafeBufferPointer { bytes in
            for y in 0..<size.height {
                let row = bytes.baseAddress! + y * size.width
                var count = 0
                for x in 0..<size.width { count += Int(row[x] & 1) }
                if count == 0 { continue }
                area += count
                top = min(top, y)
                bottom = y
                for x in 0..<left where row[x] > 0 {
                    left = x
                    break
                }
                var x = size.width - 1
                while x > right, row[x] == 0 { x -= 1 }
                right = max(right, x)
            }
        }
        let box = CGRect(x: left, y: top, width: right - left + 1, height: bottom - top + 1)
        return (area, area > 0 ? box : nil)
    }
}
