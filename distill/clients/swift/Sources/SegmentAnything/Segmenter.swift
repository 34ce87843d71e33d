#if canImport(CoreML)
import CoreGraphics
@preconcurrency import CoreML
import CoreVideo
import Foundation
import ImageIO

/// A Segment Anything encoder and decoder at work. Make one and keep it, for loading takes long; `embed` once for each
/// picture, `mask` at every click.
///
/// It uses `MLModel` itself: no class is generated, so nothing hides `Swift.Encoder`, and two students do not collide.
public actor Segmenter {
    /// Longest side of the images that the model knows; four times that of its low-resolution masks.
    public nonisolated let imageSize: Int
    /// Longest side of what the encoder takes; less than `imageSize` where the student looks at fewer pixels.
    public nonisolated let inputSize: Int
    /// Points and corners of a box that fit into a prompt.
    public nonisolated let room: Int

    private let encoder: MLModel
    private let decoder: MLModel
    private let buffer: CVPixelBuffer
    private let nothing: MLMultiArray

    /// - Parameters:
    ///   - encoder: a package, which is compiled once and kept in the caches directory; or an `.mlmodelc`.
    ///   - decoder: likewise.
    ///   - computeUnits: what Core ML may use.
    public init(encoder: URL, decoder: URL, computeUnits: MLComputeUnits = .all) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        let encoder = try await ModelStore.load(encoder, configuration)
        let decoder = try await ModelStore.load(decoder, configuration)
        guard
            let image = encoder.modelDescription.inputDescriptionsByName["image"]?.imageConstraint,
            let made = encoder.modelDescription.outputDescriptionsByName["image_embeddings"]?.multiArrayConstraint
        else { throw SegmenterError.model("the encoder has no image and image_embeddings: is it one of these?") }
        let inputs = decoder.modelDescription.inputDescriptionsByName
        guard
            let taken = inputs["image_embeddings"]?.multiArrayConstraint,
            let places = inputs["point_coords"]?.multiArrayConstraint?.shape, places.count == 3,
            let earlier = inputs["mask_input"]?.multiArrayConstraint?.shape, earlier.count == 4
        else {
            throw SegmenterError.model("the decoder has no image_embeddings, point_coords and mask_input")
        }
        guard made.shape.isEmpty || made.shape == taken.shape else {
            throw SegmenterError.model("the encoder makes \(made.shape), and the decoder takes \(taken.shape)")
        }
        (self.encoder, self.decoder) = (encoder, decoder)
        imageSize = 4 * earlier[3].intValue
        inputSize = image.pixelsWide
        room = places[1].intValue
        buffer = try makeBuffer(side: image.pixelsWide)
        nothing = try .of([], earlier.map(\.intValue), .float16)
    }

    /// What the model sees in a picture.
    ///
    /// - Parameters:
    ///   - image: in any colour space, which is converted to sRGB, of any depth. Alpha is dropped where colours are not
    ///     multiplied by it, as Pillow's `convert("RGB")` does; where they are, the picture is seen on black.
    ///   - orientation: a `CGImage` knows none; that of the file, or of the `UIImage`. Points are then in pixels of the
    ///     upright picture.
    public func embed(_ image: CGImage, orientation: CGImagePropertyOrientation = .up) throws -> Embedding {
        try encode(size: fill(buffer, with: image, orientation))
    }

    /// The same of a camera's frame: `kCVPixelFormatType_32BGRA`, in sRGB.
    public func embed(_ frame: CVPixelBuffer, orientation: CGImagePropertyOrientation = .up) throws -> Embedding {
        try encode(size: fill(buffer, with: frame, orientation))
    }

    /// The same of a file, turned as it says.
    public func embed(contentsOf file: URL) throws -> Embedding {
        let (image, orientation) = try read(file)
        return try embed(image, orientation: orientation)
    }

    private func encode(size: PixelSize) throws -> Embedding {
        let made = try encoder.prediction(
            from: MLDictionaryFeatureProvider(dictionary: ["image": MLFeatureValue(pixelBuffer: buffer)]))
        return Embedding(array: try array("image_embeddings", of: made), size: size)
    }

    /// The mask of one object.
    ///
    /// - Parameters:
    ///   - embedding: of the picture.
    ///   - points: clicks, in pixels of the upright picture.
    ///   - labels: 1 for each that is on the object, 0 off it; default: all are on it.
    ///   - box: around the object; together with points or instead of them.
    ///   - previous: an earlier answer for this picture, which this one corrects.
    ///   - size: of the mask; default: the picture's. That of a view is faster: it costs as much as it has pixels.
    public func mask(
        for embedding: Embedding, points: [CGPoint] = [], labels: [Int]? = nil, box: CGRect? = nil,
        previous: Mask? = nil, at size: PixelSize? = nil
    ) throws -> Mask {
        let prompt = try Prompt(points: points, labels: labels, box: box)
        if prompt.isEmpty && previous == nil { throw SegmenterError.emptyPrompt }
        let (coords, kinds) = try prompt.slots(room: room, picture: embedding.size, longest: imageSize)
        let made = try decoder.prediction(
            from: MLDictionaryFeatureProvider(dictionary: [
                "image_embeddings": MLFeatureValue(multiArray: embedding.array),
                "point_coords": MLFeatureValue(multiArray: try .of(coords, [1, room, 2], .float32)),
                "point_labels": MLFeatureValue(multiArray: try .of(kinds, [1, room], .float32)),
                "mask_input": MLFeatureValue(multiArray: try earlier(previous)),
                "has_mask_input": MLFeatureValue(multiArray: try .of([previous == nil ? 0 : 1], [1], .float16)),
            ]))
        let predicted = try array("iou_predictions", of: made).floats(count: 4)
        let chosen = prompt.choose(predicted)
        let logits = try array("low_res_masks", of: made).logits(mask: chosen, side: imageSize / 4)
        return try Mask(
            logits: logits, predictedIoU: predicted[chosen], picture: embedding.size, at: size ?? embedding.size)
    }

    private func earlier(_ mask: Mask?) throws -> MLMultiArray {
        guard let logits = mask?.logits else { return nothing }
        let side = imageSize / 4
        guard logits.side == side else {
            throw SegmenterError.otherModel("an earlier mask has \(logits.side)² logits, and this model's \(side)²")
        }
        return try .of(logits.values, [1, 1, side, side], .float16)
    }

    private func array(_ name: String, of output: MLFeatureProvider) throws -> MLMultiArray {
        guard let found = output.featureValue(for: name)?.multiArrayValue else {
            throw SegmenterError.model("the model made no \(name)")
        }
        return found
    }
}

/// What a model sees in a picture; goes back to it untouched. Nothing writes to it, so it may cross threads.
public struct Embedding: @unchecked Sendable {
    let array: MLMultiArray
    /// Of the upright picture.
    public let size: PixelSize
}
#endif
