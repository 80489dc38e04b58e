export default { server: { allowedHosts: ['.sbx.test'] } }
