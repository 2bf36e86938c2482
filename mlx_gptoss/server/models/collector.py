"""What /metrics says about each model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .named import NamedModel
from .remote import RemoteModel


class ModelsCollector(Collector):
    """Reads the state of the models whenever the metrics are read."""

    def __init__(self, models: Sequence[NamedModel]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        prefix = "mlx_gptoss_model"
        loaded = GaugeMetricFamily(f"{prefix}_loaded", "1 while the model is loaded", labels=["model"])
        loads = CounterMetricFamily(f"{prefix}_loads", "How often its process has loaded it", labels=["model"])
        crashes = CounterMetricFamily(f"{prefix}_crashes", "How often its process has failed", labels=["model"])
        for named in (each for each in self._models if each.adapter is None):
            loaded.add_metric([named.id], float(named.state == "loaded"))
            if isinstance(named.model, RemoteModel):
                loads.add_metric([named.id], named.model.loads)
                crashes.add_metric([named.id], named.model.crashes)
        return [loaded, loads, crashes]
