/// From the decoder's logits to a picture's pixels: segment-anything enlarges them to the model's size, cuts off what was
/// padding, and resizes what is left to the picture, bilinear both times (`Sam.postprocess_masks`). Both are linear in each
/// axis, so a pixel is a weighted sum of three logits across and three down, and no large array of logits is made.
struct Enlarging {
    private let size: PixelSize
    private let across: Axis
    private let down: Axis

    /// - Parameters:
    ///   - cells: side of the logits.
    ///   - picture: whose mask it is; the model's size is 4 × cells, of which it fills a part.
    ///   - size: that the mask is wanted at: the picture's, or that of a display.
    init(cells: Int, picture: PixelSize, size: PixelSize) throws {
        guard size.width > 0, size.height > 0 else { throw SegmenterError.noPixels(size) }
        let inside = try picture.fitted(longest: 4 * cells)
        self.size = size
        across = Axis(cells: cells, inside: inside.width, pixels: size.width)
        down = Axis(cells: cells, inside: inside.height, pixels: size.height)
    }

    /// A byte a pixel, row by row: 255 where the logit is above 0, else 0.
    func mask(_ logits: Logits) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: size.width * size.height)
        guard let object = Region(logits) else { return bytes }
        let columns = across.pixels(heeding: object.columns)
        let cells = logits.side
        var line = [Float](repeating: 0, count: cells)
        logits.values.withUnsafeBufferPointer { values in
            line.withUnsafeMutableBufferPointer { line in
                bytes.withUnsafeMutableBufferPointer { bytes in
                    for y in down.pixels(heeding: object.rows) {
                        let row = values.baseAddress! + down.first[y] * cells
                        let (a, b, c) = (down.weights[3 * y], down.weights[3 * y + 1], down.weights[3 * y + 2])
                        for x in 0..<cells { line[x] = a * row[x] + b * row[cells + x] + c * row[2 * cells + x] }
                        across.spread(
                            UnsafePointer(line.baseAddress!), columns, into: bytes.baseAddress! + y * size.width)
                    }
                }
            }
        }
        return bytes
    }
}

/// Rows and columns of logits between which all lie that are above 0.
private struct Region {
    let rows: ClosedRange<Int>
    let columns: ClosedRange<Int>

    init?(_ logits: Logits) {
        let side = logits.side
        var (left, right, top, bottom) = (side, -1, side, -1)
        logits.values.withUnsafeBufferPointer { values in
            for y in 0..<side {
                for x in 0..<side where values[y * side + x] > 0 {
                    left = min(left, x)
                    right = max(right, x)
                    top = min(top, y)
                    bottom = y
                }
            }
        }
        guard bottom >= 0 else { return nil }
        (rows, columns) = (top...bottom, left...right)
    }
}

/// For each pixel of an axis: the first of three logits, and their weights.
private struct Axis {
    private(set) var first: [Int]
    private(set) var weights: [Float]

    init(cells: Int, inside: Int, pixels: Int) {
        first = [Int](repeating: 0, count: pixels)
        weights = [Float](repeating: 0, count: 3 * pixels)
        for pixel in 0..<pixels {
            let outer = Self.neighbours(pixel, from: inside, to: pixels)
            let start = min(Self.neighbours(outer.low, from: cells, to: 4 * cells).low, cells - 3)
            first[pixel] = start
            for (place, part) in [(outer.low, 1 - outer.share), (outer.high, outer.share)] {
                let inner = Self.neighbours(place, from: cells, to: 4 * cells)
                weights[3 * pixel + inner.low - start] += part * (1 - inner.share)
                weights[3 * pixel + inner.high - start] += part * inner.share
            }
        }
    }

    /// torch's bilinear source of a pixel (align_corners=False), in float32 as torch has it: two neighbours, and the weight
    /// of the second.
    private static func neighbours(_ place: Int, from: Int, to: Int) -> (low: Int, high: Int, share: Float) {
        let scale = Float(from) / Float(to)
        let at = max(scale * (Float(place) + 0.5) - 0.5, 0)
        let low = min(Int(at), from - 1)
        return (low, min(low + 1, from - 1), min(max(at - Float(low), 0), 1))
    }

    /// Those that heed one of these logits; elsewhere a mean of what is not above 0 is not above 0.
    func pixels(heeding logits: ClosedRange<Int>) -> Range<Int> {
        let start = first.firstIndex { $0 + 2 >= logits.lowerBound } ?? first.count
        let end = first.lastIndex { $0 <= logits.upperBound }.map { $0 + 1 } ?? 0
        return start..<max(start, end)
    }

    func spread(_ line: UnsafePointer<Float>, _ pixels: Range<Int>, into row: UnsafeMutablePointer<UInt8>) {
        first.withUnsafeBufferPointer { first in
            weights.withUnsafeBufferPointer { weights in
                var weight = weights.baseAddress! + 3 * pixels.lowerBound
                for x in pixels {
                    let at = line + first[x]
                    let logit = weight[0] * at[0] + weight[1] * at[1] + weight[2] * at[2]
                    row[x] = logit > 0 ? 255 : 0
                    weight += 3
                }
            }
        }
    }
}
