export default async function Said({ params }) {
  return <p>said {(await params).word}</p>
}
