/// Pillow's BILINEAR, by which the model was trained: a triangle filter that widens where the picture shrinks, in two
/// passes of fixed-point arithmetic with 8 bits between them, columns before rows. Other resizing gives other masks.
///
/// Pillow 13 takes the rows first where the height shrinks more than twice as much as the width: there the two differ by up
/// to one grey level; everywhere else they are equal to the bit.
public enum Resizing {
    /// The mean colour in 8 bits, which the encoder takes for the mean itself: blue, green, red.
    public static let padding: (blue: UInt8, green: UInt8, red: UInt8) = (104, 116, 124)

    private static let bits: Int32 = 22  // 32 less 8 of a level, less 2 so that a sum cannot overflow
    private static let half: Int32 = 1 << 21
    private static let rowsAtOnce = 16

    /// What the encoder takes: the picture, resized to a longest side, at the top left of side × side pixels, the rest in
    /// the mean colour. Bytes are blue, green, red, 255.
    ///
    /// - Parameters:
    ///   - square: side × bytesPerRow bytes at least; all of the first side × 4 bytes of each row are written.
    public static func fill(
        _ square: UnsafeMutableRawPointer, side: Int, bytesPerRow: Int, with picture: Picture
    ) throws {
        let inside = try picture.size.fitted(longest: side)
        let pixels = resize(picture, to: inside)
        let (blue, green, red) = padding
        let swapped = picture.order == .rgba
        pixels.withUnsafeBufferPointer { pixels in
            for y in 0..<side {
                let row = (square + y * bytesPerRow).assumingMemoryBound(to: UInt8.self)
                let filled = y < inside.height ? inside.width : 0
                var from = y * inside.width * 4
                var to = 0
                for _ in 0..<filled {
                    row[to] = pixels[swapped ? from + 2 : from]
                    row[to + 1] = pixels[from + 1]
                    row[to + 2] = pixels[swapped ? from : from + 2]
                    row[to + 3] = 255
                    from += 4
                    to += 4
                }
                for _ in filled..<side {
                    row[to] = blue
                    row[to + 1] = green
                    row[to + 2] = red
                    row[to + 3] = 255
                    to += 4
                }
            }
        }
    }

    /// A picture at another size, four bytes a pixel in its own order; the fourth means nothing.
    public static func resize(_ picture: Picture, to size: PixelSize) -> [UInt8] {
        let narrow = narrowed(picture, to: size.width)
        return shortened(narrow, rowBytes: size.width * 4, from: picture.size.height, to: size.height)
    }

    /// All rows of a picture at another width.
    private static func narrowed(_ picture: Picture, to width: Int) -> [UInt8] {
        let taps = Taps(from: picture.size.width, to: width)
        let height = picture.size.height
        return [UInt8](unsafeUninitializedCapacity: height * width * 4) { narrow, count in
            let room = UnsafeMutableRawPointer.allocate(byteCount: rowsAtOnce * picture.size.width * 4, alignment: 16)
            defer { room.deallocate() }
            var y = 0
            while y < height {
                let some = y..<min(y + rowsAtOnce, height)
                let (rows, step) = picture.rows(some, room: room)
                for number in 0..<some.count {
                    narrowRow(
                        (rows + number * step).assumingMemoryBound(to: UInt8.self),
                        into: narrow.baseAddress! + (y + number) * width * 4, taps)
                }
                y = some.upperBound
            }
            count = height * width * 4
        }
    }

    private static func narrowRow(_ row: UnsafePointer<UInt8>, into narrow: UnsafeMutablePointer<UInt8>, _ taps: Taps) {
        taps.withPointers { first, counts, weights in
            var to = narrow
            for x in 0..<taps.size {
                var from = row + first[x] * 4
                var weight = weights + x * taps.room
                var (a, b, c) = (half, half, half)
                for _ in 0..<counts[x] {
                    let share = weight.pointee
                    a &+= Int32(from[0]) &* share
                    b &+= Int32(from[1]) &* share
                    c &+= Int32(from[2]) &* share
                    from += 4
                    weight += 1
                }
                to[0] = level(a)
                to[1] = level(b)
                to[2] = level(c)
                to[3] = 255
                to += 4
            }
        }
    }

    /// Rows of bytes, of which fewer or more are made.
    private static func shortened(_ narrow: [UInt8], rowBytes: Int, from height: Int, to new: Int) -> [UInt8] {
        let taps = Taps(from: height, to: new)
        var sums = [Int32](repeating: 0, count: rowBytes)
        return [UInt8](unsafeUninitializedCapacity: new * rowBytes) { made, count in
            narrow.withUnsafeBufferPointer { narrow in
                sums.withUnsafeMutableBufferPointer { sums in
                    for y in 0..<new {
                        sums.update(repeating: half)
                        for tap in 0..<taps.counts[y] {
                            let share = taps.weights[y * taps.room + tap]
                            let row = narrow.baseAddress! + (taps.first[y] + tap) * rowBytes
                            for x in 0..<rowBytes { sums[x] &+= Int32(row[x]) &* share }
                        }
                        let row = made.baseAddress! + y * rowBytes
                        for x in 0..<rowBytes { row[x] = level(sums[x]) }
                    }
                }
            }
            count = new * rowBytes
        }
    }

    @inline(__always)
    private static func level(_ sum: Int32) -> UInt8 {
        UInt8(truncatingIfNeeded: min(max(sum >> bits, 0), 255))
    }
}

/// For each pixel of a resized axis: the first old one that it is made of, how many, and their weights in 22 bits
/// (`precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c).
struct Taps {
    let size: Int
    /// Weights a pixel, of which `counts` are used.
    let room: Int
    private(set) var first: [Int]
    private(set) var counts: [Int]
    private(set) var weights: [Int32]

    init(from old: Int, to new: Int) {
        let scale = Double(old) / Double(new)
        let support = max(scale, 1)
        size = new
        room = Int(support.rounded(.up)) * 2 + 1
        first = [Int](repeating: 0, count: new)
        counts = first
        weights = [Int32](repeating: 0, count: new * room)
        for place in 0..<new {
            let center = (Double(place) + 0.5) * scale
            let low = max(Int(center - support + 0.5), 0)
            let high = min(Int(center + support + 0.5), old)
            var shares = [Double]()
            for pixel in low..<high {
                shares.append(max(1 - abs((Double(pixel) - center + 0.5) * (1 / support)), 0))
            }
            let sum = shares.reduce(0, +)
            for (tap, share) in shares.enumerated() {
                weights[place * room + tap] = Int32((share / sum) * Double(1 << 22) + 0.5)
            }
            first[place] = low
            counts[place] = high - low
        }
    }

    @inline(__always)
    func withPointers(_ body: (UnsafePointer<Int>, UnsafePointer<Int>, UnsafePointer<Int32>) -> Void) {
        first.withUnsafeBufferPointer { first in
            counts.withUnsafeBufferPointer { counts in
                weights.withUnsafeBufferPointer { weights in
                    body(first.baseAddress!, counts.baseAddress!, weights.baseAddress!)
                }
            }
        }
    }
}
