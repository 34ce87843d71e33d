import CoreGraphics
import CoreML
import CoreVideo

let size = 1024 // prompts are in pixels of an image of this longest side
let input = 1024 // the encoder takes an image of this one

/// Width and height of an image with this longest side.
func resized(_ width: Int, _ height: Int, _ longest: Int) -> (width: Double, height: Double) {
    let scale = Double(longest) / Double(max(width, height))
    return ((Double(width) * scale + 0.5).rounded(.down), (Double(height) * scale + 0.5).rounded(.down))
}

/// The image at the top left of input × input pixels, the rest in the mean colour. A CGImage knows no orientation: turn
/// a photograph upright first.
func pixelBuffer(of image: CGImage) -> CVPixelBuffer? {
    var made: CVPixelBuffer?
    CVPixelBufferCreate(nil, input, input, kCVPixelFormatType_32BGRA, nil, &made)
    guard let buffer = made, let space = CGColorSpace(name: CGColorSpace.sRGB) else { return nil }
    CVPixelBufferLockBaseAddress(buffer, [])
    defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
    guard let context = CGContext(
        data: CVPixelBufferGetBaseAddress(buffer), width: input, height: input, bitsPerComponent: 8,
        bytesPerRow: CVPixelBufferGetBytesPerRow(buffer), space: space,
        bitmapInfo: CGBitmapInfo.byteOrder32Little.rawValue | CGImageAlphaInfo.noneSkipFirst.rawValue)
    else { return nil }
    context.setFillColor(CGColor(srgbRed: 124.0 / 255.0, green: 116.0 / 255.0, blue: 104.0 / 255.0, alpha: 1.0))
    context.fill(CGRect(x: 0, y: 0, width: input, height: input))
    context.interpolationQuality = .high
    let (width, height) = resized(image.width, image.height, input)
    // Core Graphics counts y from the bottom.
    context.draw(image, in: CGRect(x: 0.0, y: Double(input) - height, width: width, height: height))
    return buffer
}

/// Make one and keep it, for loading takes long. `embed` once for each image, `segment` at every click.
final class Segmenter {
    private let encoder: Encoder
    private let decoder: Decoder

    init() throws {
        encoder = try Encoder(configuration: MLModelConfiguration())
        decoder = try Decoder(configuration: MLModelConfiguration())
    }

    func embed(_ image: CGImage) throws -> MLMultiArray? {
        guard let buffer = pixelBuffer(of: image) else { return nil }
        return try encoder.prediction(image: buffer).image_embeddings
    }

    /// points: x, y in pixels of the original image, and label; a box is two points with labels 2 and 3.
    func segment(
        _ embedding: MLMultiArray, imageWidth: Int, imageHeight: Int, points: [(x: Double, y: Double, label: Double)]
    ) throws -> (masks: MLMultiArray, ious: MLMultiArray) {
        let (width, height) = resized(imageWidth, imageHeight, size)
        var prompt: [[Double]] = points.map { point in
            [point.x * width / Double(imageWidth), point.y * height / Double(imageHeight), point.label]
        }
        if !points.contains(where: { $0.label == 2 }) { prompt.append([0, 0, -1]) }
        let count = NSNumber(value: prompt.count)
        let coords = try MLMultiArray(shape: [1, count, 2], dataType: .float32)
        let labels = try MLMultiArray(shape: [1, count], dataType: .float32)
        for (number, point) in prompt.enumerated() {
            let index = NSNumber(value: number)
            coords[[0, index, 0]] = NSNumber(value: point[0])
            coords[[0, index, 1]] = NSNumber(value: point[1])
            labels[[0, index]] = NSNumber(value: point[2])
        }
        let made = try decoder.prediction(image_embeddings: embedding, point_coords: coords, point_labels: labels)
        return (made.low_res_masks, made.iou_predictions)
    }
}
