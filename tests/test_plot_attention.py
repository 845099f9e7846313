"""Attention maps: their values are those of the cross-attention, their places on the page, and the command line."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.testing import assert_close

from datasets.classes import Classes
from evaluation.attention_maps import AttentionMaps, View, attention_maps, recorded, view
from evaluation.pictures import colour_of
from flags.parser import get_args_parser
from models.attention import merge_heads
from scripts import plot_attention
from scripts.plot_attention import Subject, best_queries, draw_map, draw_page, main, query_for
from tests.small import FLAGS, build_small
from util.errors import InputError

LAYERS = 3  # of the small model, with 7 queries and 8 heads
CLASSES = Classes({1: 1, 2: 2}, {1: "circle", 2: "square"})


@pytest.fixture(scope="module")
def model():
    return build_small("--num_classes", 3)[0]


@pytest.fixture(scope="module")
def image():
    return torch.randint(256, (3, 96, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    flags = [*FLAGS, "--min_size", 64, "--max_size", 107]
    args = get_args_parser().parse_args(list(map(str, flags)))
    path = tmp_path_factory.mktemp("model") / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "args": vars(args), **CLASSES.state_dict()}, path)
    return path


@pytest.fixture
def photo(image, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


def subject_of(image, seen, name="Conditional DETR") -> Subject:
    return Subject(name, image, seen, seen.logits.sigmoid(), CLASSES)


@pytest.mark.parametrize("layer", [*range(LAYERS), -1])
def test_combined_maps_are_the_attention_that_the_model_used(layer, model, image):
    attention = model.transformer.decoder.layers[layer].cross_attn
    with recorded(attention) as calls:
        seen = view(model, image, layer)
    (query, key, value, *_), (output, mean) = calls[attention]
    maps = AttentionMaps(*(x.flatten(-2) for x in seen.maps))  # [h, Q, S]
    with torch.no_grad():
        assert_close(attention.out_proj(merge_heads(maps.combined[None] @ value)), output, atol=1e-5, rtol=0)
    assert_close(mean[0], maps.combined.mean(0), atol=1e-6, rtol=0)
    logits = query[0] @ key[0].mT / query.shape[-1] ** 0.5
    assert_close(maps.combined, logits.softmax(-1), atol=1e-6, rtol=0)
    product = maps.spatial * maps.content  # softmax(a + b) is softmax(a) · softmax(b), normalised
    assert_close(product / product.sum(-1, keepdim=True), maps.combined, atol=1e-6, rtol=0)
    for a, b in ((maps.spatial, maps.content), (maps.spatial, maps.combined), (maps.content, maps.combined)):
        assert (a - b).abs().max() > 0.01


def test_a_view_covers_the_cells_of_the_image_and_leaves_no_hooks(model, image):
    seen = view(model, image)
    assert seen.maps.spatial.shape == (8, 7, 3, 7)  # 96×200 pixels at stride 32
    with torch.no_grad():
        outputs = model([image])
    assert_close(seen.logits, outputs["pred_logits"][0], atol=0, rtol=0)
    assert_close(seen.boxes, outputs["pred_boxes"][0], atol=0, rtol=0)
    expected = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid().detach()
    assert_close(seen.reference, expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_spatial_maps_follow_positions_and_content_maps_do_not(model, image):
    before = view(model, image).maps
    weight = model.transformer.decoder.layers[-1].ca_kpos_proj.weight
    try:
        weight.data.mul_(3)
        after = view(model, image).maps
    finally:
        weight.data.div_(3)
    assert_close(after.content, before.content, atol=0, rtol=0)
    assert (after.spatial - before.spatial).abs().max() > 0.01


def test_spatial_and_content_maps_have_the_scale_of_the_combined_map():
    query, key = torch.zeros(1, 1, 4), torch.zeros(1, 3, 4)  # one head, content and spatial parts of width 2
    query[..., 0], query[..., 2] = 1, 1
    key[0, 1, 0] = 2 * np.log(3)  # content, seen at cell 1
    key[0, 2, 2] = 2 * np.log(8)  # position, seen at cell 2
    maps = attention_maps(query, key)
    assert_close(maps.content[0, 0], torch.tensor([1, 3, 1]) / 5)
    assert_close(maps.spatial[0, 0], torch.tensor([1, 1, 8]) / 10)
    assert_close(maps.combined[0, 0], torch.tensor([1, 3, 8]) / 12)


@pytest.mark.parametrize("cell", [(1, 1), (2, 4), (3, 2)])
def test_a_cell_is_drawn_around_its_centre(cell):
    rows, columns, height, width = 5, 7, 150, 280
    attention = np.zeros((rows, columns))
    attention[cell] = 0.3
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    draw_map(figure.add_axes((0, 0, 1, 1), frameon=False), np.zeros((height, width)), attention, (-9, -9, -5, -5))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].sum(-1).astype(float)
    drawn -= np.median(drawn)
    y, x = ((drawn * axis).sum() / drawn.sum() for axis in np.mgrid[:height, :width] + 0.5)
    assert y == pytest.approx((cell[0] + 0.5) * height / rows, abs=0.5)
    assert x == pytest.approx((cell[1] + 0.5) * width / columns, abs=0.5)


@pytest.mark.parametrize("size", [(96, 200), (300, 60)])
def test_a_page_keeps_the_aspect_ratio_of_the_image(size, model):
    height, width = size
    picture = torch.zeros(3, *size, dtype=torch.uint8)
    seen = view(model, picture)
    subject = subject_of(picture, seen)
    page = draw_page([(subject, 5), (subject, 2)])
    page.canvas.draw()
    assert page.bbox.width < 1700
    assert [axes.get_title() for axes in page.axes if "query" in axes.get_title()] == ["query 5", "query 2"]
    assert [axes.get_ylabel() for axes in page.axes if axes.get_ylabel()] == [*AttentionMaps._fields] * 2
    pictures = [axes for axes in page.axes if axes.images]
    assert len(pictures) == 2 * (1 + 3 * 8)
    for axes in pictures:
        assert axes.bbox.width / axes.bbox.height == pytest.approx(width / height)
        assert page.bbox.containsx(axes.bbox.x0)
        assert page.bbox.containsx(axes.bbox.x1)
        assert all(tuple(layer.get_extent()) == (0, width, height, 0) for layer in axes.images)
    cx, cy, w, h = (seen.boxes[5] * torch.tensor([width, height, width, height])).tolist()
    for axes in pictures[1 : 1 + 3 * 8]:
        (box,) = (patch for patch in axes.patches if patch.get_width() > 0)
        assert box.get_bbox().bounds == pytest.approx((cx - w / 2, cy - h / 2, w, h), abs=1e-3)
    (point,) = pictures[0].lines
    assert point.get_xydata()[0] == pytest.approx((seen.reference[5] * torch.tensor([width, height])).numpy())


def test_the_photo_of_a_query_has_its_box_and_class(model, image):
    """They are drawn after the photo is resized for the page."""
    seen = view(model, image)._replace(
        boxes=torch.full((7, 4), 0.5), logits=torch.tensor([-9.0, -9.0, 2.0]).expand(7, 3)
    )
    (photo,) = draw_page([(subject_of(image, seen), 5)]).axes[0].images
    pixels = np.asarray(photo.get_array())
    height, width = pixels.shape[:2]
    coloured = (pixels == colour_of(2)).all(-1)
    assert min(height, width) > 190
    assert coloured[3 * height // 4, width // 4 : 3 * width // 4].all()  # the lower edge of the box
    assert coloured[: height // 4].sum() > 200  # the text above it


def test_an_object_that_two_queries_detect_counts_once():
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.31, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.7, 0.3, 0.1, 0.1]])
    logits = torch.tensor([[-9.0, 1.0], [2.0, -9.0], [-1.0, -9.0], [0.0, -9.0]])
    subject = subject_of(None, View(None, None, logits, boxes))
    assert best_queries(subject, 3) == [1, 3, 2]
    assert best_queries(subject, 2) == [1, 3]
    # The query of another model has the highest score of those with an IoU of 0.5 or more, or else the highest IoU.
    assert query_for(torch.tensor([0.3, 0.3, 0.2, 0.2]), subject) == 1
    assert query_for(torch.tensor([0.7, 0.3, 0.1, 0.12]), subject) == 3
    assert query_for(torch.tensor([0.72, 0.5, 0.2, 0.3]), subject) == 2


def test_a_comparison_shows_the_same_objects_for_both_models(checkpoint, photo, tmp_path, capsys, monkeypatch):
    """DETR's block follows that of Conditional DETR; models may differ in their heads, queries and image sizes."""
    model, _ = build_small("--model", "detr", "--num_classes", 3, "--nheads", 4, "--num_queries", 9)
    flags = [*FLAGS, "--model", "detr", "--nheads", 4, "--num_queries", 9, "--min_size", 96, "--max_size", 160]
    args = get_args_parser().parse_args(list(map(str, flags)))
    other = tmp_path / "detr.pth"
    torch.save({"model": model.state_dict(), "args": vars(args), **CLASSES.state_dict()}, other)
    pages = []
    draw = plot_attention.draw_page
    monkeypatch.setattr(plot_attention, "draw_page", lambda blocks: pages.append(draw(blocks)) or pages[-1])
    main([*argv(checkpoint, photo, tmp_path / "a.png"), "--compare", str(other), "--queries", "5", "2"])
    queries = capsys.readouterr().out.strip().split("queries ")[1].split(", ")
    assert queries[::2] == ["5", "2"]
    titles = [axes.get_title() for axes in pages[0].axes if "query" in axes.get_title()]
    names = ["Conditional DETR", "DETR"] * 2
    assert titles == [f"{name}, query {query}" for name, query in zip(names, queries, strict=True)]
    assert len([axes for axes in pages[0].axes if axes.images]) == 2 * (1 + 3 * 8) + 2 * (1 + 3 * 4)
    assert pages[0].bbox.height == pytest.approx(4 * 250, abs=200)


@pytest.mark.parametrize(
    "flags, queries, ending",
    [(("--top", 2), 2, "png"), (("--queries", 6, 0, "--layer", 0), 2, "JPG"), (("--queries", 0), 1, "svg")],
)
def test_the_command_writes_a_page_of_the_chosen_queries(flags, queries, ending, checkpoint, photo, tmp_path, capsys):
    output = tmp_path / "new" / f"attention.{ending}"
    main([*argv(checkpoint, photo, output), *map(str, flags)])
    printed = capsys.readouterr().out
    assert f"wrote {output}: queries" in printed
    named = printed.split("queries ")[1].split(",")
    assert len(named) == queries
    if "--queries" in flags:
        assert [int(query) for query in named] == list(flags[1 : 1 + queries])
    if ending == "svg":
        assert "<svg" in output.read_text()
    else:
        width, height = Image.open(output).size
        assert 1400 < width < 1700
        assert height == pytest.approx(queries * 250, abs=100)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--queries", 2, 7), "--queries 7: the model's queries are 0 to 6"),
        (("--queries", -1), "--queries -1: must be at least 0"),
        (("--top", 0), "--top 0: must be at least 1"),
        (("--layer", 3), "--layer 3: the decoder layers of {checkpoint} are 0 to 2"),
        (("--layer", -4), "--layer -4: the decoder layers of {checkpoint} are 0 to 2"),
        (("--output", "a.xyz"), "--output a.xyz: the file's name must end in one of ."),
        (("--output", "attention"), "--output attention: the file's name must end in one of"),
        (("--queries", 0, "--output", "{photo}/a.png"), "photo.png/a.png: cannot be written"),
        (("--queries", 0, "--output", "{folder}"), "folder.png: cannot be written"),
        (("--image", "absent.jpg"), "absent.jpg: cannot be read (No such file"),
        (("--image", "{broken}"), "broken.png: cannot be decoded (image file is truncated"),
        (("--image", "{text}"), "text.jpg: cannot be decoded (not an image"),
        (("--checkpoint", "absent.pth"), "absent.pth: no such checkpoint"),
        (("--checkpoint", "{text}"), "text.jpg: not a checkpoint"),
        (("--compare", "absent.pth"), "absent.pth: no such checkpoint"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, checkpoint, photo, tmp_path):
    places = {"photo": photo, "folder": tmp_path / "folder.png", "text": tmp_path / "text.jpg"}
    places["broken"] = tmp_path / "broken.png"
    places["folder"].mkdir()
    places["text"].write_text("no image")
    places["broken"].write_bytes(photo.read_bytes()[:5000])
    with pytest.raises(InputError) as error:
        main([*argv(checkpoint, photo, tmp_path / "a.png"), *(str(flag).format(**places) for flag in flags)])
    assert message.replace("{checkpoint}", str(checkpoint)) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a.png").exists()


def argv(checkpoint, image, output) -> list[str]:
    return ["--device", "cpu", "--checkpoint", str(checkpoint), "--image", str(image), "--output", str(output)]
