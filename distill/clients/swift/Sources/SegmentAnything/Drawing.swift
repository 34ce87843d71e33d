#if canImport(CoreML)
import CoreGraphics
import CoreVideo
import Foundation
import ImageIO

/// Writes a picture as the encoder takes it; returns the size of the upright picture.
func fill(
    _ square: CVPixelBuffer, with image: CGImage, _ orientation: CGImagePropertyOrientation
) throws -> PixelSize {
    let context = try drawn(image)
    return try withExtendedLifetime(context) {
        guard let bytes = context.data else { throw SegmenterError.unreadable("the picture cannot be drawn") }
        let stored = PixelSize(width: context.width, height: context.height)
        return try fill(
            square,
            with: Picture(
                bytes, stored: stored, bytesPerRow: context.bytesPerRow, order: .bgra,
                orientation: Int(orientation.rawValue)))
    }
}

/// The same of a camera's frame.
func fill(
    _ square: CVPixelBuffer, with frame: CVPixelBuffer, _ orientation: CGImagePropertyOrientation
) throws -> PixelSize {
    guard CVPixelBufferGetPixelFormatType(frame) == kCVPixelFormatType_32BGRA else {
        throw SegmenterError.unreadable("a frame has to be of kCVPixelFormatType_32BGRA")
    }
    CVPixelBufferLockBaseAddress(frame, .readOnly)
    defer { CVPixelBufferUnlockBaseAddress(frame, .readOnly) }
    guard let bytes = CVPixelBufferGetBaseAddress(frame) else { throw SegmenterError.unreadable("an empty frame") }
    let stored = PixelSize(width: CVPixelBufferGetWidth(frame), height: CVPixelBufferGetHeight(frame))
    return try fill(
        square,
        with: Picture(
            bytes, stored: stored, bytesPerRow: CVPixelBufferGetBytesPerRow(frame), order: .bgra,
            orientation: Int(orientation.rawValue)))
}

private func fill(_ square: CVPixelBuffer, with picture: Picture) throws -> PixelSize {
    CVPixelBufferLockBaseAddress(square, [])
    defer { CVPixelBufferUnlockBaseAddress(square, []) }
    guard let bytes = CVPixelBufferGetBaseAddress(square) else {
        throw SegmenterError.unreadable("the encoder's image cannot be written")
    }
    try Resizing.fill(
        bytes, side: CVPixelBufferGetWidth(square), bytesPerRow: CVPixelBufferGetBytesPerRow(square), with: picture)
    return picture.size
}

/// A picture as bytes in sRGB, blue, green, red and nothing, at its own size: nothing is resampled here.
private func drawn(_ image: CGImage) throws -> CGContext {
    let info = CGBitmapInfo.byteOrder32Little.rawValue | CGImageAlphaInfo.noneSkipFirst.rawValue
    guard
        let space = CGColorSpace(name: CGColorSpace.sRGB),
        let context = CGContext(
            data: nil, width: image.width, height: image.height, bitsPerComponent: 8, bytesPerRow: 0, space: space,
            bitmapInfo: info)
    else { throw SegmenterError.unreadable("a picture of \(image.width)×\(image.height) px cannot be drawn") }
    context.interpolationQuality = .none
    context.setBlendMode(.copy)
    context.draw(withoutAlpha(image), in: CGRect(x: 0, y: 0, width: image.width, height: image.height))
    return context
}

/// The same colours, opaque. Where they are multiplied by alpha they cannot be had back, and the image stays as it is.
private func withoutAlpha(_ image: CGImage) -> CGImage {
    let skipped: CGImageAlphaInfo
    switch image.alphaInfo {
    case .last: skipped = .noneSkipLast
    case .first: skipped = .noneSkipFirst
    default: return image
    }
    guard let space = image.colorSpace, let provider = image.dataProvider else { return image }
    let info = image.bitmapInfo.rawValue & ~CGBitmapInfo.alphaInfoMask.rawValue | skipped.rawValue
    let opaque = CGImage(
        width: image.width, height: image.height, bitsPerComponent: image.bitsPerComponent,
        bitsPerPixel: image.bitsPerPixel, bytesPerRow: image.bytesPerRow, space: space,
        bitmapInfo: CGBitmapInfo(rawValue: info), provider: provider, decode: image.decode, shouldInterpolate: false,
        intent: .defaultIntent)
    return opaque ?? image
}

/// The first picture of a file, and how it is to be turned.
func read(_ file: URL) throws -> (CGImage, CGImagePropertyOrientation) {
    guard
        let source = CGImageSourceCreateWithURL(file as CFURL, nil),
        let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
    else { throw SegmenterError.unreadable("\(file.path) is not a picture that can be read") }
    let about = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any]
    let turned = (about?[kCGImagePropertyOrientation] as? NSNumber)?.uint32Value ?? 1
    return (image, CGImagePropertyOrientation(rawValue: turned) ?? .up)
}

/// What the encoder takes, in memory that the Neural Engine and the GPU see as well.
func makeBuffer(side: Int) throws -> CVPixelBuffer {
    var made: CVPixelBuffer?
    let attributes: [CFString: Any] = [kCVPixelBufferIOSurfacePropertiesKey: [CFString: Any]()]
    CVPixelBufferCreate(nil, side, side, kCVPixelFormatType_32BGRA, attributes as CFDictionary, &made)
    guard let buffer = made else { throw SegmenterError.unreadable("no memory for an image of \(side)×\(side) px") }
    return buffer
}

extension Mask {
    /// Grey, 8 bits: white on the object, black elsewhere.
    public var cgImage: CGImage? {
        guard let provider = CGDataProvider(data: Data(bytes) as CFData) else { return nil }
        return CGImage(
            width: size.width, height: size.height, bitsPerComponent: 8, bitsPerPixel: 8, bytesPerRow: size.width,
            space: CGColorSpaceCreateDeviceGray(), bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.none.rawValue),
            provider: provider, decode: nil, shouldInterpolate: false, intent: .defaultIntent)
    }

    /// Writes `cgImage` as a PNG.
    public func write(to file: URL) throws {
        guard
            let image = cgImage,
            let destination = CGImageDestinationCreateWithURL(file as CFURL, "public.png" as CFString, 1, nil)
        else { throw SegmenterError.unreadable("\(file.path) cannot be written") }
        CGImageDestinationAddImage(destination, image, nil)
        if !CGImageDestinationFinalize(destination) {
            throw SegmenterError.unreadable("\(file.path) cannot be written")
        }
    }
}
#endif
