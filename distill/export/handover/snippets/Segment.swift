import CoreGraphics
import Foundation
import SegmentAnything

let segmenter = try await Segmenter(  // once: loading takes long
    encoder: Bundle.main.url(forResource: "ENCODER", withExtension: "mlmodelc")!,
    decoder: Bundle.main.url(forResource: "DECODER", withExtension: "mlmodelc")!)

let picture = try await segmenter.embed(image, orientation: .up)  // a CGImage, once
let points = [CGPoint(x: 320, y: 240)]  // in pixels of the upright picture
let mask = try await segmenter.mask(for: picture, points: points)  // at every click
let shown: CGImage? = mask.cgImage  // white on the object
