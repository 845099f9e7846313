"""A small transformer, and a small model with weights like those of a trained one, and its criterion."""

from main import get_args_parser
from models import build_model
from models.conditional_detr import ConditionalDecoder, ConditionalDETR
from models.criterion import SetCriterion
from models.transformer import Encoder, Transformer
from tests.reference import reference_weights

FLAGS = ("--backbone", "resnet18", "--enc_layers", 2, "--dec_layers", 3, "--dim_feedforward", 64, "--num_queries", 7)


def small_transformer(enc_layers: int = 1, dec_layers: int = 2, dropout: float = 0.0) -> Transformer:
    sizes = 16, 2, 32, dropout
    return Transformer(Encoder(enc_layers, *sizes), ConditionalDecoder(dec_layers, *sizes))


def build_small(*flags: object) -> tuple[ConditionalDETR, SetCriterion]:
    model, criterion, _ = build_model(get_args_parser().parse_args([str(flag) for flag in (*FLAGS, *flags)]))
    model.load_state_dict(reference_weights(model.state_dict()))
    return model.eval(), criterion
