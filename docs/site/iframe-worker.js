/* Search works from disk: a browser lets no page of file:// start a worker, so there the worker's
   script runs in a hidden frame of the same page instead. Elsewhere nothing changes. */
if (location.protocol === "file:") {
  // the name by which the theme's search knows that it runs in a frame
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.src = "about:blank"
      document.documentElement.appendChild(frame)
      const inner = (this.inner = frame.contentWindow)
      const load = (source) =>
        new Promise((done, failed) => {
          const script = inner.document.createElement("script")
          script.src = source
          script.onload = done
          script.onerror = failed
          inner.document.documentElement.appendChild(script)
        })
      inner.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve())
      inner.postMessage = (data) => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      load(url).then(() => {
        this.ready = true
        this.waiting.splice(0).forEach((data) => this.tell(data))
      })
    }
    tell(data) {
      this.inner.dispatchEvent(new inner_event(this.inner, data))
    }
    postMessage(data) {
      if (this.ready) this.tell(data)
      else this.waiting.push(data)
    }
    terminate() {
      this.inner.frameElement?.remove()
    }
  }
  const inner_event = function (inner, data) {
    return new inner.MessageEvent("message", { data })
  }
}
