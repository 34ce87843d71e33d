// Answers the jobs of asked.json, for tests/distill/clients/test_swift.py.

import Foundation
import SegmentAnything

struct Asked: Decodable {
    var width = 0, height = 0, side = 0, orientation = 1, bytesPerRow = 0
    var order = "rgba"
    var cells = 0
    var at = [Int]()
    var points = [[Double]](), labels = [Int](), box = [Double]()
    var ious = [Float]()
}

func file(_ name: String) -> URL { URL(fileURLWithPath: name) }

func answer(_ job: Asked, _ name: String) throws -> [String: Any] {
    let picture = PixelSize(width: job.width, height: job.height)
    if job.cells == 0 {  // resize
        let bytes = [UInt8](try Data(contentsOf: file("\(name).pixels")))
        var square = [UInt8](repeating: 7, count: job.side * (job.side * 4 + 12))
        try bytes.withUnsafeBytes { bytes in
            try square.withUnsafeMutableBytes { square in
                let picture = Picture(
                    bytes.baseAddress!, stored: picture, bytesPerRow: job.bytesPerRow,
                    order: job.order == "rgba" ? .rgba : .bgra, orientation: job.orientation)
                try Resizing.fill(square.baseAddress!, side: job.side, bytesPerRow: job.side * 4 + 12, with: picture)
            }
        }
        try Data(square).write(to: file("\(name).square"))
        return [:]
    }
    let half = [UInt8](try Data(contentsOf: file("\(name).logits")))
    let corners = job.box
    let prompt = try Prompt(
        points: job.points.map { CGPoint(x: $0[0], y: $0[1]) }, labels: job.labels,
        box: corners.isEmpty
            ? nil
            : CGRect(x: corners[0], y: corners[1], width: corners[2] - corners[0], height: corners[3] - corners[1]))
    let chosen = prompt.choose(job.ious)
    let row = job.cells + 5
    let logits = half.withUnsafeBytes {
        Logits(half: $0, mask: chosen, side: job.cells, strides: (mask: job.cells * row, row: row, column: 1))
    }
    let mask = try Mask(
        logits: logits, predictedIoU: job.ious[chosen], picture: picture,
        at: PixelSize(width: job.at[0], height: job.at[1]))
    try Data(mask.bytes).write(to: file("\(name).mask"))
    let slots = try prompt.slots(room: 18, picture: picture, longest: 4 * job.cells)
    let box = mask.boundingBox.map { [$0.minX, $0.minY, $0.maxX, $0.maxY].map(Double.init) } ?? []
    return ["coords": slots.coords, "labels": slots.labels, "chosen": chosen, "area": mask.area, "box": box]
}

var halves = [UInt16](), floats = [Float]()
for bits in UInt16.min...UInt16.max { floats.append(Half.float(bits)) }
try floats.withUnsafeBytes { try Data($0).write(to: file("halves.floats")) }
let single = [UInt8](try Data(contentsOf: file("floats")))
single.withUnsafeBytes { for value in $0.bindMemory(to: Float.self) { halves.append(Half.bits(value)) } }
try halves.withUnsafeBytes { try Data($0).write(to: file("floats.halves")) }

let jobs = try JSONDecoder().decode([Asked].self, from: Data(contentsOf: file("asked.json")))
let answers = try jobs.enumerated().map { try answer($0.element, String($0.offset)) }
try JSONSerialization.data(withJSONObject: answers).write(to: file("answered.json"))
