"""A small model with weights as training would leave them, in evaluation mode, and its criterion."""

from main import get_args_parser
from models import build_model
from models.conditional_detr import ConditionalDETR
from models.criterion import SetCriterion
from tests.reference import reference_weights

FLAGS = ("--backbone", "resnet18", "--enc_layers", 2, "--dec_layers", 3, "--dim_feedforward", 64, "--num_queries", 7)


def build_small(*flags: object) -> tuple[ConditionalDETR, SetCriterion]:
    model, criterion, _ = build_model(get_args_parser().parse_args([str(flag) for flag in (*FLAGS, *flags)]))
    model.load_state_dict(reference_weights(model.state_dict()))
    return model.eval(), criterion
