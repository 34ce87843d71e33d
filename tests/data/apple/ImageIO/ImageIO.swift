import CoreGraphics

public enum CGImagePropertyOrientation: UInt32, Sendable {
    case up = 1, upMirrored, down, downMirrored, leftMirrored, right, rightMirrored, left
}

public let kCGImagePropertyOrientation: CFString = "Orientation"

/// A file of a line of numbers (width, height, orientation, alpha info) and pixels: red, green, blue, alpha.
public final class CGImageSource {
    let numbers: [Int]
    let pixels: Data

    init?(_ file: URL) {
        guard let bytes = try? Data(contentsOf: file), let end = bytes.firstIndex(of: 10) else { return nil }
        numbers = String(decoding: bytes[..<end], as: UTF8.self).split(separator: " ").compactMap { Int($0) }
        pixels = Data(bytes[(end + 1)...])
        if numbers.count != 4 { return nil }
    }
}

public func CGImageSourceCreateWithURL(_ file: CFURL, _ options: CFDictionary?) -> CGImageSource? { CGImageSource(file) }

public func CGImageSourceCreateImageAtIndex(_ source: CGImageSource, _ index: Int, _ options: CFDictionary?) -> CGImage? {
    CGImage(
        width: source.numbers[0], height: source.numbers[1], bitsPerComponent: 8, bitsPerPixel: 32,
        bytesPerRow: source.numbers[0] * 4, space: CGColorSpace(name: CGColorSpace.sRGB)!,
        bitmapInfo: CGBitmapInfo(rawValue: UInt32(source.numbers[3])), provider: CGDataProvider(data: source.pixels)!,
        decode: nil, shouldInterpolate: false, intent: .defaultIntent)
}

public func CGImageSourceCopyPropertiesAtIndex(
    _ source: CGImageSource, _ index: Int, _ options: CFDictionary?
) -> CFDictionary? {
    [kCGImagePropertyOrientation: NSNumber(value: source.numbers[2])]
}

public final class CGImageDestination {
    let file: URL
    var image: CGImage?
    init(_ file: URL) { self.file = file }
}

public func CGImageDestinationCreateWithURL(
    _ file: CFURL, _ type: CFString, _ count: Int, _ options: CFDictionary?
) -> CGImageDestination? { type == "public.png" ? CGImageDestination(file) : nil }

public func CGImageDestinationAddImage(_ destination: CGImageDestination, _ image: CGImage, _ properties: CFDictionary?) {
    destination.image = image
}

/// Writes the bytes as they are.
public func CGImageDestinationFinalize(_ destination: CGImageDestination) -> Bool {
    guard let image = destination.image else { return false }
    return (try? image.bytes.write(to: destination.file)) != nil
}
