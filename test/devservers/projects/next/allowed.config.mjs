export default { allowedDevOrigins: ['*.sbx.test'] }
