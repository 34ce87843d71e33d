/// float16 as its bits: Swift has no `Float16` on Intel Macs and Linux.
public enum Half {
    public static let one: UInt16 = 0x3C00

    /// The number that 16 bits stand for (IEEE 754 binary16).
    @inline(__always)
    public static func float(_ bits: UInt16) -> Float {
        let sign = UInt32(bits & 0x8000) << 16
        let rest = UInt32(bits & 0x7FFF)
        if rest >= 0x7C00 { return Float(bitPattern: sign | 0x7F80_0000 | (rest & 0x3FF) << 13) }  // infinite, or NaN
        if rest >= 0x400 { return Float(bitPattern: sign | ((rest << 13) &+ 0x3800_0000)) }
        let small = Float(rest) * 0x1p-24  // below 2⁻¹⁴ there is no leading one
        return sign == 0 ? small : -small
    }

    /// The nearest float16, of two that are as near the even one; infinite beyond 65519.
    public static func bits(_ value: Float) -> UInt16 {
        let pattern = value.bitPattern
        let sign = UInt16(truncatingIfNeeded: pattern >> 16) & 0x8000
        let magnitude = pattern & 0x7FFF_FFFF
        if magnitude > 0x7F80_0000 { return sign | 0x7E00 }
        if magnitude >= 0x477F_F000 { return sign | 0x7C00 }
        if magnitude < 0x3880_0000 {
            let steps = Float(bitPattern: magnitude) * 0x1p24
            return sign | UInt16(steps.rounded(.toNearestOrEven))
        }
        let rebased = magnitude - 0x3800_0000
        return sign | UInt16(truncatingIfNeeded: (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13)
    }
}
