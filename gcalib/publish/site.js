// Draw each chart of a page in the place of its PNG.
for (const figure of document.querySelectorAll("figure.chart")) {
  const drawn = document.createElement("div");
  const chart = JSON.parse(figure.querySelector("script").textContent);
  vegaEmbed(drawn, chart, {actions: false, renderer: "svg"}).then(() => figure.replaceChildren(drawn));
}
