#if canImport(CoreML)
import CoreML
import Foundation

/// Arrays read and written through their memory: a subscript makes an object for each number.
extension MLMultiArray {
    /// A new array with these values, row by row.
    static func of(_ values: [Float], _ shape: [Int], _ type: MLMultiArrayDataType) throws -> MLMultiArray {
        let made = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: type)
        made.fill(with: values)
        return made
    }

    /// Writes values, float32 or float16, row by row into an array that was just made, and 0 behind them. Such an array has
    /// no gaps.
    func fill(with values: [Float]) {
        let half = dataType == .float16
        withUnsafeMutableBytes { bytes, _ in
            bytes.initializeMemory(as: UInt8.self, repeating: 0)
            for (place, value) in values.enumerated() {
                if half {
                    bytes.storeBytes(of: Half.bits(value), toByteOffset: 2 * place, as: UInt16.self)
                } else {
                    bytes.storeBytes(of: value, toByteOffset: 4 * place, as: Float.self)
                }
            }
        }
    }

    /// The first values along the last axis.
    func floats(count: Int) throws -> [Float] {
        guard let step = strides.last?.intValue, let size = shape.last?.intValue, size >= count else {
            throw SegmenterError.model("an array of \(shape) has no \(count) values")
        }
        let half = try isHalf()
        return withUnsafeBytes { bytes in
            (0..<count).map { place in
                half
                    ? Half.float(bytes.load(fromByteOffset: 2 * place * step, as: UInt16.self))
                    : bytes.load(fromByteOffset: 4 * place * step, as: Float.self)
            }
        }
    }

    /// One of the masks of an array (1, masks, side, side).
    func logits(mask: Int, side: Int) throws -> Logits {
        guard shape.map(\.intValue) == [1, 4, side, side] else {
            throw SegmenterError.model("low_res_masks are \(shape), and not 1 × 4 × \(side) × \(side)")
        }
        let steps = (mask: strides[1].intValue, row: strides[2].intValue, column: strides[3].intValue)
        let half = try isHalf()
        return withUnsafeBytes { bytes in
            half
                ? Logits(half: bytes, mask: mask, side: side, strides: steps)
                : Logits(single: bytes, mask: mask, side: side, strides: steps)
        }
    }

    private func isHalf() throws -> Bool {
        switch dataType {
        case .float16: return true
        case .float32: return false
        default: throw SegmenterError.model("an array is of type \(dataType.rawValue), and not float16 or float32")
        }
    }
}
#endif
