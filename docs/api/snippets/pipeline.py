from rlsd.models.fashion import PATH
from rlsd.pipeline.items import Plan, load_items, name_sources
from rlsd.pipeline.metrics import psnr
from rlsd.pipeline.model import open_model
from rlsd.pipeline.reconstruct import reconstruct_items
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import find_task

photos = sorted((PATH / "test_images").glob("*.png"))[:2]
with open_model("fashion") as engine:
    task = find_task("sr4", engine.operators)
    settings = settings_for(task, "fashion", {"particles": 2, "steps": 60})
    plan = Plan(task, settings, name_sources(photos))
    for outcome in reconstruct_items(engine, load_items(engine, plan)):
        mean = outcome.particles.mean(0)
        print(f"{outcome.item.name}: {psnr(mean, outcome.item.truth):.1f} dB")
