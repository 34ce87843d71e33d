// swift run segment PHOTO X Y [X Y ...] [FOLDER]: what is at these pixels, to mask.png. The packages lie in FOLDER, by default
// the one above this package.

import Foundation
import SegmentAnything

func stop(_ line: String) -> Never {
    FileHandle.standardError.write(Data("segment: \(line)\n".utf8))
    exit(2)
}

#if canImport(CoreML)
let arguments = Array(CommandLine.arguments.dropFirst())
let numbers = arguments.dropFirst().prefix { Double($0) != nil }.compactMap(Double.init)
guard let photo = arguments.first, numbers.count >= 2, numbers.count.isMultiple(of: 2) else {
    stop("segment PHOTO X Y [X Y ...] [FOLDER]")
}
let points = stride(from: 0, to: numbers.count, by: 2).map { CGPoint(x: numbers[$0], y: numbers[$0 + 1]) }
let folder = arguments.dropFirst(1 + numbers.count).first ?? ".."

do {
    let (encoder, decoder) = try Packages.pair(in: URL(fileURLWithPath: folder))
    let segmenter = try await Segmenter(encoder: encoder, decoder: decoder)
    let picture = try await segmenter.embed(contentsOf: URL(fileURLWithPath: photo))
    let mask = try await segmenter.mask(for: picture, points: points)
    try mask.write(to: URL(fileURLWithPath: "mask.png"))
    print("mask.png: \(mask.area) pixels, predicted IoU \(mask.predictedIoU)")
} catch {
    stop("\(error)")
}
#else
stop("needs Core ML, and so a Mac")
#endif
