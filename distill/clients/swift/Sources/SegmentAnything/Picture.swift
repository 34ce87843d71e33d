/// Pixels of a picture as they lie in memory, four bytes each, and which way up they are to be seen.
///
/// It does not own them: they have to be there as long as it is used.
public struct Picture {
    /// In which order a pixel's bytes lie. The fourth, alpha or nothing, is dropped, as Pillow's `convert("RGB")` does.
    public enum Order: Sendable {
        case rgba
        case bgra
    }

    /// Of the upright picture; in whose pixels points are meant.
    public let size: PixelSize
    let order: Order
    /// Its top left pixel, and how many bytes further the next one to the right and the next one below lie.
    let first: UnsafeRawPointer
    let across: Int
    let down: Int

    /// - Parameters:
    ///   - bytes: of the picture as it is stored, row after row.
    ///   - stored: its size before it is turned.
    ///   - bytesPerRow: from one row to the next.
    ///   - orientation: EXIF's, 1 to 8, which is `CGImagePropertyOrientation.rawValue`; anything else turns nothing.
    public init(
        _ bytes: UnsafeRawPointer, stored: PixelSize, bytesPerRow: Int, order: Order, orientation: Int = 1
    ) {
        let last = (stored.width - 1) * 4
        let bottom = (stored.height - 1) * bytesPerRow
        let start: Int
        switch orientation {
        case 2: (start, across, down) = (last, -4, bytesPerRow)
        case 3: (start, across, down) = (last + bottom, -4, -bytesPerRow)
        case 4: (start, across, down) = (bottom, 4, -bytesPerRow)
        case 5: (start, across, down) = (0, bytesPerRow, 4)
        case 6: (start, across, down) = (bottom, -bytesPerRow, 4)
        case 7: (start, across, down) = (last + bottom, -bytesPerRow, -4)
        case 8: (start, across, down) = (last, bytesPerRow, -4)
        default: (start, across, down) = (0, 4, bytesPerRow)
        }
        let lies = (5...8).contains(orientation)
        size = lies ? PixelSize(width: stored.height, height: stored.width) : stored
        self.order = order
        first = bytes + start
    }

    /// Where rows are at hand, a pixel every four bytes: as they are, or copied to `room` so.
    ///
    /// - Returns: the first row of them, and how many bytes further the next one lies.
    func rows(_ wanted: Range<Int>, room: UnsafeMutableRawPointer) -> (UnsafeRawPointer, Int) {
        let start = first + wanted.lowerBound * down
        if across == 4 { return (start, down) }
        let bytesPerRow = size.width * 4
        var x = 0
        while x < size.width {  // pixels of a column lie side by side in a picture that lies on its side
            var from = start + x * across
            var to = room + x * 4
            for _ in wanted {
                to.storeBytes(of: from.loadUnaligned(as: UInt32.self), as: UInt32.self)
                from += down
                to += bytesPerRow
            }
            x += 1
        }
        return (UnsafeRawPointer(room), bytesPerRow)
    }
}
