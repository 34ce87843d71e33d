/// A decoder's low-resolution mask: side × side logits, row by row, the object where they are above 0. What padding was is
/// part of it.
public struct Logits: Equatable, Sendable {
    public let side: Int
    public let values: [Float]

    public init(side: Int, values: [Float]) {
        precondition(values.count == side * side, "side × side logits")
        self.side = side
        self.values = values
    }

    /// One mask of an array (1, masks, side, side) of float16, whose rows may lie apart: those of the Neural Engine do.
    ///
    /// - Parameters:
    ///   - bytes: of the whole array.
    ///   - strides: of its last three axes, in elements.
    public init(half bytes: UnsafeRawBufferPointer, mask: Int, side: Int, strides: (mask: Int, row: Int, column: Int)) {
        self.init(bytes, mask: mask, side: side, strides: strides) { (bits: UInt16) in Half.float(bits) }
    }

    /// The same of float32.
    public init(single bytes: UnsafeRawBufferPointer, mask: Int, side: Int, strides: (mask: Int, row: Int, column: Int)) {
        self.init(bytes, mask: mask, side: side, strides: strides) { (value: Float) in value }
    }

    @inline(__always)
    private init<Element>(
        _ bytes: UnsafeRawBufferPointer, mask: Int, side: Int, strides: (mask: Int, row: Int, column: Int),
        _ float: (Element) -> Float
    ) {
        let size = MemoryLayout<Element>.size
        precondition(
            (mask * strides.mask + (side - 1) * (strides.row + strides.column) + 1) * size <= bytes.count,
            "an array of this size")
        self.side = side
        values = [Float](unsafeUninitializedCapacity: side * side) { values, count in
            for y in 0..<side {
                var from = bytes.baseAddress! + (mask * strides.mask + y * strides.row) * size
                for x in 0..<side {
                    values[y * side + x] = float(from.load(as: Element.self))
                    from += strides.column * size
                }
            }
            count = side * side
        }
    }
}
