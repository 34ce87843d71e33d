// Answers the prompts of asked.json, for tests/distill/clients/test_swift_app.py.

import Foundation
import ImageIO
import SegmentAnything

struct Asked: Decodable {
    let file: String
    let prompts: [Given]
}

struct Given: Decodable {
    let points: [[Double]]
    let labels: [Int]
    let box: [Double]
    let again: Bool
    let at: [Int]
}

let folder = URL(fileURLWithPath: "..")
let (encoder, decoder) = try Packages.pair(in: folder)
let segmenter = try await Segmenter(encoder: encoder, decoder: decoder, computeUnits: .cpuAndGPU)
var answers = [[[String: Any]]]()
let jobs = try JSONDecoder().decode([Asked].self, from: Data(contentsOf: URL(fileURLWithPath: "asked.json")))
for (number, job) in jobs.enumerated() {
    let embedding = try await segmenter.embed(contentsOf: URL(fileURLWithPath: job.file))
    var found = [[String: Any]]()
    var previous: Mask?
    for (place, given) in job.prompts.enumerated() {
        let c = given.box
        let mask = try await segmenter.mask(
            for: embedding, points: given.points.map { CGPoint(x: $0[0], y: $0[1]) }, labels: given.labels,
            box: c.isEmpty ? nil : CGRect(x: c[0], y: c[1], width: c[2] - c[0], height: c[3] - c[1]),
            previous: given.again ? previous : nil,
            at: given.at.isEmpty ? nil : PixelSize(width: given.at[0], height: given.at[1]))
        try mask.write(to: URL(fileURLWithPath: "\(number)-\(place).png"))
        found.append(["iou": mask.predictedIoU, "size": [mask.size.width, mask.size.height]])
        previous = mask
    }
    answers.append(found)
}
try JSONSerialization.data(withJSONObject: answers).write(to: URL(fileURLWithPath: "answered.json"))
print(segmenter.imageSize, segmenter.inputSize, segmenter.room)
