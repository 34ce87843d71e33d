import Foundation
import XCTest

@testable import SegmentAnything

/// What needs none of Apple's frameworks: `swift test` anywhere.
final class ArithmeticTests: XCTestCase {
    private func resize(
        _ pixels: [UInt8], _ stored: PixelSize, to size: PixelSize, orientation: Int = 1
    ) -> [UInt8] {
        pixels.withUnsafeBytes {
            let picture = Picture(
                $0.baseAddress!, stored: stored, bytesPerRow: stored.width * 4, order: .rgba, orientation: orientation)
            return Resizing.resize(picture, to: size)
        }
    }

    private func colours(_ pixels: [UInt8]) -> [UInt8] {
        pixels.enumerated().filter { $0.offset % 4 < 3 }.map(\.element)
    }

    func testPicturesAreResizedAsPillowDoes() {
        // numpy: (arange(105).reshape(7, 5, 3) * 37 % 256).astype(uint8); Pillow: resize((3, 4), BILINEAR)
        var pixels = [UInt8]()
        for value in 0..<105 {
            pixels.append(UInt8(value * 37 % 256))
            if value % 3 == 2 { pixels.append(99) }
        }
        let found = resize(pixels, PixelSize(width: 5, height: 7), to: PixelSize(width: 3, height: 4))
        let pillows: [UInt8] = [
            71, 108, 139, 120, 83, 117, 156, 130, 91, 137, 144, 123, 112, 133, 125, 113, 120, 127, 137, 144, 151, 139, 131,
            152, 141, 120, 127, 97, 134, 108, 147, 107, 144, 125, 156, 117,
        ]
        XCTAssertEqual(colours(found), pillows)
    }

    func testPicturesAreTurnedUpright() {
        // 1 2 3
        // 4 5 6
        let pixels: [UInt8] = (1...6).flatMap { [$0, 0, 0, 0] }
        let upright: [Int: [UInt8]] = [
            1: [1, 2, 3, 4, 5, 6], 2: [3, 2, 1, 6, 5, 4], 3: [6, 5, 4, 3, 2, 1], 4: [4, 5, 6, 1, 2, 3],
            5: [1, 4, 2, 5, 3, 6], 6: [4, 1, 5, 2, 6, 3], 7: [6, 3, 5, 2, 4, 1], 8: [3, 6, 2, 5, 1, 4],
        ]
        for (turn, expected) in upright {
            let size = PixelSize(width: turn > 4 ? 2 : 3, height: turn > 4 ? 3 : 2)
            let found = resize(pixels, PixelSize(width: 3, height: 2), to: size, orientation: turn)
            XCTAssertEqual(stride(from: 0, to: 24, by: 4).map { found[$0] }, expected, "orientation \(turn)")
        }
    }

    func testTheRestOfTheSquareHasTheMeanColour() throws {
        let pixels: [UInt8] = [1, 2, 3, 0, 1, 2, 3, 0]
        var square = [UInt8](repeating: 0, count: 64)
        try pixels.withUnsafeBytes { pixels in
            try square.withUnsafeMutableBytes {
                let picture = Picture(
                    pixels.baseAddress!, stored: PixelSize(width: 2, height: 1), bytesPerRow: 8, order: .rgba)
                try Resizing.fill($0.baseAddress!, side: 4, bytesPerRow: 16, with: picture)
            }
        }
        let row: [UInt8] = [3, 2, 1, 255]
        let mean: [UInt8] = [104, 116, 124, 255]
        XCTAssertEqual(square, (0..<16).flatMap { $0 < 8 ? row : mean })
    }

    func testSizesAreRoundedAsSegmentAnythingDoes() throws {
        let size = PixelSize(width: 4032, height: 3024)
        XCTAssertEqual(try size.fitted(longest: 1024), PixelSize(width: 1024, height: 768))
        XCTAssertEqual(
            try PixelSize(width: 31, height: 977).fitted(longest: 1024), PixelSize(width: 32, height: 1024))
        XCTAssertThrowsError(try PixelSize(width: 3000, height: 1).fitted(longest: 1024))
        XCTAssertThrowsError(try PixelSize(width: 0, height: 1).fitted(longest: 1024))
    }

    func testPromptsFillTheirSlots() throws {
        let picture = PixelSize(width: 2048, height: 1024)
        let prompt = try Prompt(
            points: [CGPoint(x: 100, y: 50), CGPoint(x: -3, y: 7)], labels: [1, 0],
            box: CGRect(x: 20, y: 40, width: 60, height: 80))
        let (coords, labels) = try prompt.slots(room: 6, picture: picture, longest: 1024)
        XCTAssertEqual(coords, [50, 25, -1.5, 3.5, 10, 20, 40, 60, 0, 0, 0, 0])
        XCTAssertEqual(labels, [1, 0, 2, 3, -1, -1])
        XCTAssertThrowsError(try prompt.slots(room: 3, picture: picture, longest: 1024))
        XCTAssertThrowsError(try Prompt(points: [.zero], labels: [2]))
        XCTAssertThrowsError(try Prompt(points: [.zero], labels: []))
        XCTAssertThrowsError(try Prompt(points: [CGPoint(x: Double.nan, y: 0)]))
    }

    func testOneClickIsAmbiguous() throws {
        let ious: [Float] = [0.99, 0.2, 0.8, 0.7]
        XCTAssertEqual(try Prompt(points: [.zero]).choose(ious), 2)
        XCTAssertEqual(try Prompt(points: [.zero, .zero]).choose(ious), 0)
        XCTAssertEqual(try Prompt(box: CGRect(x: 0, y: 0, width: 1, height: 1)).choose(ious), 0)
    }

    func testHalvesGoThereAndBack() {
        for bits in UInt16.min...UInt16.max where bits & 0x7FFF <= 0x7C00 {
            XCTAssertEqual(Half.bits(Half.float(bits)), bits)
        }
        XCTAssertEqual(Half.float(0x3555), 0.33325195)
        XCTAssertEqual(Half.float(0xC000), -2)
        XCTAssertEqual(Half.float(1), 0x1p-24)
        XCTAssertTrue(Half.float(0x7C01).isNaN)
        XCTAssertEqual(Half.bits(70000), 0x7C00)
    }

    func testAMaskIsWhereLogitsAreAboveNothing() throws {
        let side = 16  // images of 64 px: of one twice as wide as high the lower half is padding
        var values = [Float](repeating: -1, count: side * side)
        for y in 2..<6 { for x in 4..<8 { values[y * side + x] = 1 } }
        for y in 9..<16 { for x in 0..<16 { values[y * side + x] = 5 } }
        let picture = PixelSize(width: 128, height: 64)
        let mask = try Mask(
            logits: Logits(side: side, values: values), predictedIoU: 0.9, picture: picture, at: picture)
        XCTAssertEqual(mask.boundingBox?.minX, 32)
        XCTAssertEqual(mask.boundingBox?.maxX, 64)
        XCTAssertEqual(mask.boundingBox?.minY, 16)
        XCTAssertTrue(mask.contains(x: 40, y: 30))
        XCTAssertFalse(mask.contains(x: 80, y: 30))
        XCTAssertFalse(mask.contains(x: -1, y: 30))
        XCTAssertEqual(mask.area, mask.bytes.filter { $0 == 255 }.count)

        let nothing = Logits(side: side, values: [Float](repeating: -1, count: side * side))
        let empty = try Mask(logits: nothing, predictedIoU: 0, picture: picture, at: picture)
        XCTAssertEqual(empty.area, 0)
        XCTAssertNil(empty.boundingBox)
        XCTAssertThrowsError(
            try Mask(logits: nothing, predictedIoU: 0, picture: picture, at: PixelSize(width: 0, height: 1)))
    }

    func testPackagesOfAFolder() throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        defer { try? FileManager.default.removeItem(at: folder) }
        for name in ["AEncoder_8bit.mlpackage", "AEncoder.mlpackage", "ADecoder.mlpackage", "Encoder.txt"] {
            try FileManager.default.createDirectory(
                at: folder.appendingPathComponent(name), withIntermediateDirectories: true)
        }
        let (encoder, decoder) = try Packages.pair(in: folder)
        XCTAssertEqual(encoder.lastPathComponent, "AEncoder.mlpackage")
        XCTAssertEqual(decoder.lastPathComponent, "ADecoder.mlpackage")
        XCTAssertThrowsError(try Packages.key(of: encoder))

        let file = encoder.appendingPathComponent("weight.bin")
        try Data([1, 2]).write(to: file)
        let first = try Packages.key(of: encoder)
        XCTAssertEqual(first, try Packages.key(of: encoder))
        try Data([1, 2, 3]).write(to: file)
        XCTAssertNotEqual(first, try Packages.key(of: encoder))
    }
}
