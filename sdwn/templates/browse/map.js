// The browser's map: what is chosen stands beside it, with an image, and leads to its synset.
if (document.getElementById("class-map")) {
  const about = document.getElementById("circle");
  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  classMap({
    follow: true,
    onChoose: (link) => {
      const { name, group, rate, picture } = link.dataset;
      about.replaceChildren(
        element("h2", {}, element("a", { href: link.href.baseVal, textContent: name })),
        element("p", { className: "quiet", textContent: `${group} · ${rate}` }),
        ...(picture ? [element("img", { src: picture, width: 192, height: 192, alt: `An image of ${name}` })] : []),
      );
    },
  });
}
