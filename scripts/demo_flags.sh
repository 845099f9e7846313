# Sourced by demo.sh and demo_masks.sh: flags of their small detector and its training, all of it from random weights, in
# minutes on two CPU cores. What such short trainings gain from is in docs/log.md: a linear schedule, an average of the
# weights, images that all fill the same square, more weight on the classes, and gradients that are not clipped as the
# recipe for COCO does.
images=(--min_size 104 --max_size 104 --batch_size 8 --num_workers 1 --eval_every 3)
schedule=(--lr_schedule linear --clip_max_norm 0)
detector=(
  --backbone resnet18 --backbone_weights none --backbone_norm batch
  --enc_layers 1 --dec_layers 2 --dim_feedforward 512 --dropout 0 --num_queries 10
  --lr 2e-4 --lr_backbone 4e-4 --ema_decay 0.997 --cls_loss_coef 4 --epochs 9
)
# The detector stays as it is, so a step costs little: only the mask head is trained.
head=(--masks --lr 1e-3 --ema_decay 0.99 --epochs 6)
